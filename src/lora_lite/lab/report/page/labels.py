"""Where the labels of a crowded scatter go, so that none covers another label, a point or a bar. All in pixels."""

import numpy as np

Boxes = np.ndarray  # (n, 4): left, bottom, right, top

GAP = 6.0  # between a point and its label
STEP = (6.0, 4.0)  # of the grid of places that are tried, across and up
REACH = 120.0  # how far from its point a label may go
COVERED = 40.0  # what a covered thing costs, in pixels of distance; its weight multiplies it
HARD = 10.0  # the weight of what may be covered only where there is no other way: a label, a point
CROSSED = 60.0  # what a leader across another leader costs
MISTAKEN = 25.0  # what a label costs that stands nearer to another point, or whose leader passes one
CLOSE = 7.0  # how near a leader passes a point, to be taken for that point's
ROUNDS = 4


def place(anchors: np.ndarray, sizes: np.ndarray, obstacles: Boxes, weights: np.ndarray, bounds: np.ndarray) -> Boxes:
    """A box for each label, near its point.

    anchors: (n, 2) points. sizes: (n, 2) widths and heights of the labels. obstacles: (m, 4) boxes that labels keep
    off, as far as their weights (m,) say (1: COVERED). bounds: (4,), the box that labels stay in.
    Each label in turn takes the best free place, given where the others are; a few rounds settle it.
    """
    placed = np.full((len(anchors), 4), np.nan)
    crowding = [np.hypot(*(anchors - anchor).T).sum() for anchor in anchors]
    for _ in range(ROUNDS):
        before = placed.copy()
        for index in np.argsort(crowding, kind="stable"):
            others = np.delete(placed, index, axis=0)
            others, ends = others[~np.isnan(others[:, 0])], np.delete(anchors, index, axis=0)
            tried = candidates(anchors[index], sizes[index], bounds)
            cost = distance(tried, anchors[index])
            cost = np.abs(cost - GAP) + 0.02 * np.abs(tried[:, 0] - anchors[index, 0])  # beside rather than above
            cost += COVERED * (covers(tried, obstacles) @ weights)
            cost += HARD * COVERED * covers(tried, others).sum(1)
            cost += MISTAKEN * misleading(tried, anchors[index], ends[np.abs(ends - anchors[index]).max(1) < 2 * REACH])
            if len(others) == len(ends):
                cost += CROSSED * crossings(tried, anchors[index], others, ends)
            placed[index] = tried[int(np.argmin(cost))]
        if np.array_equal(before, placed):
            break
    return placed


def candidates(anchor: np.ndarray, size: np.ndarray, bounds: np.ndarray) -> Boxes:
    """Boxes of this size on a grid around a point and within bounds; at their left bottom corner if it is too large."""
    last = np.maximum(bounds[2:] - size, bounds[:2])
    low = np.clip(anchor - size - REACH, bounds[:2], last)
    high = np.clip(anchor + REACH, bounds[:2], last)
    xs = np.arange(low[0], high[0] + 1e-9, STEP[0])
    ys = np.arange(low[1], high[1] + 1e-9, STEP[1])
    corners = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
    return np.hstack([corners, corners + size])


def nearest(boxes: Boxes, point: np.ndarray) -> np.ndarray:
    """The point of each box that is nearest to `point`, (n, 2)."""
    return np.clip(point, boxes[:, :2], boxes[:, 2:])


def distance(boxes: Boxes, point: np.ndarray) -> np.ndarray:
    """From each box to a point, (n,)."""
    return np.hypot(*(nearest(boxes, point) - point).T)


def covers(boxes: Boxes, others: Boxes) -> np.ndarray:
    """Which boxes (rows) overlap which others (columns), as 0 and 1."""
    columns = others.T[:, None]
    left, bottom, right, top = boxes.T[:, :, None]
    return ((left < columns[2]) & (right > columns[0]) & (bottom < columns[3]) & (top > columns[1])).astype(float)


def misleading(boxes: Boxes, point: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For how many other points each box may be taken: it is nearer to them, or its leader passes them, (n,)."""
    stop, own = nearest(boxes, point), distance(boxes, point)
    count = np.zeros(len(boxes))
    for other in others:
        along = stop - point
        share = np.clip(((other - point) * along).sum(1) / np.maximum((along**2).sum(1), 1e-9), 0, 1)
        passes = np.hypot(*(point + share[:, None] * along - other).T) < CLOSE
        passes &= np.hypot(*(other - point)) > CLOSE
        count += (distance(boxes, other) < own) | (passes & (own > 2 * GAP))
    return count


def crossings(boxes: Boxes, point: np.ndarray, others: Boxes, ends: np.ndarray) -> np.ndarray:
    """How many leaders of the other labels (from `ends` to `others`) each box's own leader crosses, (n,)."""
    start, stop = np.broadcast_to(point, (len(boxes), 2)), nearest(boxes, point)
    other_stop = np.clip(ends, others[:, :2], others[:, 2:])
    count = np.zeros(len(boxes))
    for a, b in zip(ends, other_stop, strict=True):
        own = side(start, stop, a) * side(start, stop, b) < 0
        count += own & (side(a, b, start) * side(a, b, stop) < 0)
    return count


def side(start: np.ndarray, stop: np.ndarray, point: np.ndarray) -> np.ndarray:
    """On which side of the line from start to stop a point lies: the sign of the cross product."""
    along, to = stop - start, point - start
    return along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0]
