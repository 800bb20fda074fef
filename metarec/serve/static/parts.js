// @ts-check
/** Parts of the page: fetched as HTML, and put in the place of those with the same id. */

/** A request that the service refused, or that did not reach it; `message` is for the visitor. */
export class Problem extends Error {}

/**
 * Says what is wrong with an answer.
 * @param {number} status The HTTP status; 0 where no answer came.
 * @param {string} text The answer's body.
 * @returns {string}
 */
export function problemText(status, text) {
  if (status === 0) return "The service does not answer. Nothing was changed: try again in a moment.";
  try {
    const { message, cure } = JSON.parse(text).error;
    return [message, cure].filter(Boolean).map(sentence).join(" ");
  } catch {
    return `The service answered with an error (${status}). Try again in a moment.`;
  }
}

/** @param {string} text @returns {string} */
function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

/**
 * Fetches parts of the page.
 * @param {string} address
 * @param {RequestInit} [options]
 * @returns {Promise<string>} HTML; the promise fails with a `Problem`, or an `AbortError` where it was given up.
 */
export async function fetchParts(address, options = {}) {
  let status = 0;
  let text = "";
  try {
    const answer = await fetch(address, { ...options, headers: { "Metarec-Parts": "1" } });
    text = await answer.text();
    if (answer.ok) return text;
    status = answer.status;
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
  }
  throw new Problem(problemText(status, text));
}

/**
 * Puts every element of `html` that has an id in the place of the document's. Of a status, the text alone is replaced:
 * a live region has to stay where it is to be read out. The focus stays on what has the same id.
 * @param {Document} page
 * @param {string} html
 */
export function replaceParts(page, html) {
  const focused = page.activeElement?.id;
  const answer = new DOMParser().parseFromString(html, "text/html");
  for (const part of Array.from(answer.body.children)) {
    const old = page.getElementById(part.id);
    if (old?.getAttribute("role") === "status") old.textContent = part.textContent;
    else old?.replaceWith(part);
  }
  if (focused && page.activeElement?.id !== focused) page.getElementById(focused)?.focus();
}

/** Numbers requests of one kind, so that an answer that a newer request has overtaken is dropped. */
export class Newest {
  #last = 0;
  /** @returns {() => boolean} Says whether no newer request was begun. */
  begin() {
    const own = ++this.#last;
    return () => own === this.#last;
  }
}
