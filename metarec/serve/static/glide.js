// @ts-check
/** Moves what is drawn anew from where it was, for those who do not mind motion. */

const KEPT = ["x", "width"];
const TIME = { duration: 450, easing: "ease-out" };

/**
 * Remembers where things are, by their keys.
 * @param {Document} page
 * @returns {Map<string, {top: number, drawn: Record<string, string>}>}
 */
export function measure(page) {
  const found = new Map();
  for (const thing of Array.from(page.querySelectorAll("[data-key]"))) {
    const drawn = Object.fromEntries(KEPT.map((name) => [name, `${thing.getAttribute(name) ?? 0}px`]));
    found.set(thing.getAttribute("data-key"), { top: thing.getBoundingClientRect().top + scrollY, drawn });
  }
  return found;
}

/**
 * Lets things move from where they were.
 * @param {Document} page
 * @param {ReturnType<typeof measure>} before
 */
export function glide(page, before) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const [key, { top, drawn }] of measure(page)) {
    const was = before.get(key);
    const thing = page.querySelector(`[data-key="${CSS.escape(key)}"]`);
    if (!thing) continue;
    if (thing instanceof SVGElement) {
      if (was) thing.animate([was.drawn, drawn], TIME);
    } else if (!was) thing.animate([{ opacity: 0 }, { opacity: 1 }], TIME);
    else if (was.top !== top) thing.animate([{ translate: `0 ${was.top - top}px` }, { translate: "none" }], TIME);
  }
}
