// @ts-check
/** The page with scripts: forms answer in place, searches follow the typing, errors are said. */

import { glide, measure } from "./glide.js";
import { Newest, Problem, fetchParts, replaceParts } from "./parts.js";
import { moveFocus, rove } from "./toolbar.js";

const PAUSE = 250;
const rankings = new Newest();
const searches = new Newest();
let typing = 0;
let search = new AbortController();

/** @param {string} id @returns {HTMLElement} */
const byId = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/**
 * Shows what went wrong, or takes it away.
 * @param {unknown} [error]
 * @param {() => void} [again] What a button to try again does.
 */
function say(error, again) {
  const place = byId("problem");
  place.replaceChildren();
  if (!error) return;
  place.append(error instanceof Problem ? error.message : "Something on this page failed. Load it again.");
  if (!again) return;
  const button = document.createElement("button");
  button.textContent = "Try again";
  button.addEventListener("click", again);
  place.append(" ", button);
}

/** @param {string} html */
function show(html) {
  const before = measure(document);
  replaceParts(document, html);
  rove(document);
  glide(document, before);
  say();
}

/** @param {boolean} stale */
function markFound(stale) {
  byId("found").inert = stale;
  byId("found").setAttribute("aria-busy", String(stale));
}

/**
 * Looks for what is in the form; until the answer comes, what was found before cannot be used.
 * @param {string} address
 * @param {boolean} [focus] Whether the focus was in what is replaced.
 */
async function find(address, focus = false) {
  clearTimeout(typing);
  search.abort();
  search = new AbortController();
  const isNewest = searches.begin();
  markFound(true);
  try {
    const html = await fetchParts(address, { signal: search.signal });
    if (!isNewest()) return;
    show(html);
    if (focus) /** @type {HTMLElement | null} */ (document.querySelector("#found [tabindex='0']"))?.focus();
  } catch (error) {
    if (isNewest()) say(error, () => find(address, focus));
  }
}

/**
 * Sends a form, and shows the answer unless a newer one has come.
 * @param {HTMLFormElement} form
 * @param {HTMLElement | null} submitter
 */
async function send(form, submitter) {
  const fields = new URLSearchParams(/** @type {any} */ (new FormData(form, submitter)));
  const why = form.dataset.live === "why";
  const whyOpen = byId("why")?.getAttribute("aria-expanded") === "true";
  const isNewest = rankings.begin();
  submitter?.setAttribute("aria-busy", "true");
  document.body.classList.add("busy");
  try {
    const html = await (why
      ? fetchParts(`/ui/ranking?${fields}`)
      : fetchParts(form.action, { method: "POST", body: fields }));
    if (submitter?.hasAttribute("aria-pressed")) press(submitter);
    if (!isNewest()) return;
    show(html);
    if (!why && whyOpen) byId("why")?.click();
  } catch (error) {
    say(error, () => send(form, submitter));
  } finally {
    submitter?.removeAttribute("aria-busy");
    if (isNewest()) document.body.classList.remove("busy");
  }
}

/** Marks the rating that was chosen. @param {HTMLElement} chosen */
function press(chosen) {
  for (const button of Array.from(chosen.parentElement?.children ?? [])) {
    button.setAttribute("aria-pressed", String(button === chosen));
  }
}

document.addEventListener("submit", (event) => {
  const form = /** @type {HTMLFormElement} */ (event.target);
  const kind = form.dataset.live;
  if (!kind) return;
  event.preventDefault();
  if (kind === "find") {
    const fields = new URLSearchParams(/** @type {any} */ (new FormData(form, event.submitter)));
    find(`/ui/find?${fields}`, Boolean(event.submitter));
  } else send(form, event.submitter);
});

document.addEventListener("input", (event) => {
  const field = /** @type {HTMLInputElement} */ (event.target);
  if (field.id !== "q") return;
  clearTimeout(typing);
  searches.begin(); // an answer that is under way is no longer meant
  markFound(true);
  typing = window.setTimeout(() => find(`/ui/find?${new URLSearchParams({ q: field.value })}`), PAUSE);
});

document.addEventListener("keydown", (event) => moveFocus(event, document));
document.addEventListener("click", (event) => {
  const button = /** @type {Element} */ (event.target).closest("#all");
  if (button) button.setAttribute("aria-expanded", String(byId("ranking").classList.toggle("whole")));
});

rove(document);
