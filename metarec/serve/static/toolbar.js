// @ts-check
/** Rows of buttons that take one tab stop each; arrow keys move inside a row, and from row to row. */

const STEPS = /** @type {Record<string, [number, number]>} */ ({
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  Home: [0, -Infinity],
  End: [0, Infinity],
});

/**
 * Returns where a key leads.
 * @param {string} key
 * @param {[number, number]} place Row and column.
 * @param {[number, number]} size Rows and columns.
 * @returns {[number, number] | null} Null for keys that do not move.
 */
export function placeAfter(key, place, size) {
  const step = STEPS[key];
  if (!step) return null;
  const [row, column] = [0, 1].map((at) => Math.min(Math.max(place[at] + step[at], 0), size[at] - 1));
  return [row, column];
}

/** @param {ParentNode} within @returns {HTMLElement[][]} */
function rows(within) {
  const bars = Array.from(within.querySelectorAll("[role=toolbar]"));
  return bars.map((bar) => /** @type {HTMLElement[]} */ (Array.from(bar.querySelectorAll("button"))));
}

/** @param {HTMLElement[]} row @param {HTMLElement} chosen */
function choose(row, chosen) {
  for (const button of row) button.tabIndex = button === chosen ? 0 : -1;
}

/**
 * Leaves each row one tab stop: the pressed button, or the first.
 * @param {ParentNode} within
 */
export function rove(within) {
  for (const row of rows(within)) {
    choose(row, row.find((button) => button.getAttribute("aria-pressed") === "true") ?? row[0]);
  }
}

/**
 * Moves the focus.
 * @param {KeyboardEvent} event
 * @param {ParentNode} within
 */
export function moveFocus(event, within) {
  const all = rows(within);
  const row = all.findIndex((buttons) => buttons.includes(/** @type {HTMLElement} */ (event.target)));
  if (row < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
  const column = all[row].indexOf(/** @type {HTMLElement} */ (event.target));
  const place = placeAfter(event.key, [row, column], [all.length, all[row].length]);
  if (!place) return;
  event.preventDefault();
  const next = all[place[0]][Math.min(place[1], all[place[0]].length - 1)];
  choose(all[place[0]], next);
  next.focus();
}
