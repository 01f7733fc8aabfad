"use strict";

const find = (selector) => [...document.querySelectorAll(selector)];

// Light and dark: as the system has it, until the button is pressed.

const theme = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
let dark = system.matches;

function paint(chosen) {
  dark = chosen;
  theme.textContent = dark ? "Light colours" : "Dark colours";
}

theme.addEventListener("click", () => {
  paint(!dark);
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
});
system.addEventListener("change", () => {
  if (!document.documentElement.style.colorScheme) paint(system.matches);
});
paint(dark);
theme.hidden = false;

// The tokens of a document, drawn when it is opened.

const STRONG = 0.2; // of the strongest token: underlined

function heat(text) {
  const letters = Array.from(text.textContent); // code points, as were counted
  const lengths = text.dataset.lengths.split(" ").map(Number);
  const scores = text.dataset.scores.split(" ").map(Number);
  const largest = scores.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  const drawn = document.createDocumentFragment();
  let start = 0;
  scores.forEach((score, i) => {
    const end = start + lengths[i];
    const token = document.createElement("span");
    const weight = largest ? Math.abs(score) / largest : 0;
    token.className = `token ${score < 0 ? "negative" : "positive"}`;
    token.classList.toggle("strong", weight >= STRONG);
    token.style.setProperty("--weight", weight.toFixed(3));
    token.title = String(score).replace("-", "−");
    token.textContent = letters.slice(start, end).join("");
    drawn.append(token);
    start = end;
  });
  text.replaceChildren(drawn);
  delete text.dataset.scores;
}

document.addEventListener(
  "toggle",
  (event) => {
    const text = event.target.querySelector?.("[data-scores]");
    if (event.target.open && text) heat(text);
  },
  true, // since toggle does not bubble
);

// The filter: every word has to be in the document or its name.

const items = find(".documents li");
const filter = document.getElementById("filter");
let haystack = null;

function sift() {
  haystack ??= items.map((item) =>
    [".name", ".text"]
      .map((part) => item.querySelector(part).textContent)
      .join(" ")
      .toLowerCase(),
  );
  const words = filter.value.toLowerCase().split(/\s+/);
  let shown = 0;
  items.forEach((item, i) => {
    item.hidden = !words.every((word) => haystack[i].includes(word));
    shown += !item.hidden;
  });
  count(shown);
}

function count(shown) {
  filter.form.querySelector("output").value =
    `${shown} of ${items.length} documents`;
}

if (filter) {
  filter.addEventListener("input", sift);
  filter.form.addEventListener("submit", (event) => event.preventDefault());
  filter.form.hidden = false;
  find(".keys").forEach((keys) => (keys.hidden = false));
  count(items.length);
}

// Keys, where a document has the focus: to others, and to other queries.

function step(summary, by) {
  const all = find(".documents li:not([hidden]) summary");
  return all[all.indexOf(summary) + by];
}

function beside(summary, by) {
  const rankings = find(".ranking");
  const shown = (x) => x.querySelector(".documents li:not([hidden]) summary");
  const place = rankings.indexOf(summary.closest(".ranking"));
  const others = by > 0 ? rankings.slice(place + 1)
    : rankings.slice(0, place).reverse();
  return others.map(shown).find(Boolean);
}

const KEYS = {
  ArrowDown: (summary) => step(summary, 1),
  ArrowUp: (summary) => step(summary, -1),
  ArrowRight: (summary) => beside(summary, 1),
  ArrowLeft: (summary) => beside(summary, -1),
};

document.addEventListener("keydown", (event) => {
  const summary = event.target.closest?.(".documents summary");
  const held = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey;
  if (!summary || held || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key](summary)?.focus();
});
