"""The page of a study: one HTML file that needs no network, and its pictures as PNG files beside it."""

from lora_lite.lab.report.page.builder import write_page

__all__ = ["write_page"]
