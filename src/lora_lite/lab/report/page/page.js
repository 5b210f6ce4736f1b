"use strict";

// The table: sorted by a click, Enter or Space on a header; filtered by words and by verdict.
const rows = document.getElementById("arm-rows");
const headers = [...document.querySelectorAll("#arms th[scope=col]")];
const original = [...rows.rows];

function compare(kind, column) {
  const value = (row) => row.cells[column].dataset.sort;
  return (one, other, sign) => {
    const [a, b] = [value(one), value(other)];
    if (a === "" || b === "") return (a === "") - (b === ""); // missing values come last, whichever way
    return sign * (kind === "number" ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
  };
}

function sortBy(header) {
  const before = header.getAttribute("aria-sort");
  const opposite = { ascending: "descending", descending: "ascending" };
  const order = before ? opposite[before] : header.dataset.first;
  for (const other of headers) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", order);
  const rank = compare(header.dataset.kind, headers.indexOf(header));
  const sign = order === "ascending" ? 1 : -1;
  rows.append(...[...original].sort((one, other) => rank(one, other, sign)));
}

for (const header of headers) header.querySelector("button").addEventListener("click", () => sortBy(header));

const find = document.getElementById("find");
const verdict = document.getElementById("verdict");

function filterArms() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of original) {
    const fits = words.every((word) => row.dataset.find.includes(word));
    row.hidden = !(fits && (verdict.value === "*" || row.dataset.verdict === verdict.value));
    shown += !row.hidden;
  }
  document.getElementById("arm-count").value = `${shown} of ${original.length} arms`;
}

document.getElementById("choices").hidden = false;
document.getElementById("arm-controls").addEventListener("submit", (event) => event.preventDefault());
find.addEventListener("input", filterArms);
verdict.addEventListener("input", filterArms);
filterArms();

// Columns: groups are switched on and off; where the table still scrolls, it says so.
const table = document.getElementById("arms");
const box = table.parentElement;
const groups = document.getElementById("group-controls");

function showMore() {
  const hidden = box.scrollWidth - box.clientWidth;
  document.getElementById("scroll-hint").hidden = hidden <= 1;
  document.getElementById("frame").classList.toggle("more", box.scrollLeft < hidden - 1);
}

function showGroups() {
  for (const choice of groups.querySelectorAll("input")) table.classList.toggle(`no-${choice.value}`, !choice.checked);
  const sorted = document.querySelector("#arms [aria-sort]");
  if (sorted && !sorted.offsetParent) { // an order by what is out of sight would be a riddle
    sorted.removeAttribute("aria-sort");
    rows.append(...original);
  }
  showMore();
}

groups.addEventListener("submit", (event) => event.preventDefault());
groups.addEventListener("input", showGroups);
box.addEventListener("scroll", showMore, { passive: true });
window.addEventListener("resize", showMore);
showGroups();

// The examples: by arm, and by right or wrong.
const controls = document.getElementById("example-controls");
if (controls) {
  const items = [...document.querySelectorAll(".item")];
  const arm = document.getElementById("example-arm");
  const outcome = document.getElementById("example-outcome");
  const filterExamples = () => {
    let shown = 0;
    for (const item of items) {
      let here = 0;
      for (const reply of item.querySelectorAll(".reply")) {
        const fits = (arm.value === "*" || reply.dataset.arm === arm.value)
          && (outcome.value === "*" || reply.dataset.outcome === outcome.value);
        reply.hidden = !fits;
        here += fits;
      }
      item.hidden = !here;
      if (arm.value !== "*") item.open = true; // one line each: all fit on the screen
      shown += here;
    }
    document.getElementById("example-count").value = `${shown} ${shown === 1 ? "reply" : "replies"}`;
    document.getElementById("no-example").hidden = shown > 0;
  };
  controls.hidden = false;
  arm.addEventListener("input", filterExamples);
  outcome.addEventListener("input", filterExamples);
  filterExamples();
}
