"use strict";

// Filters, sorts and finds the problems of the list. Without this script all of them are shown.
const form = document.getElementById("filters");
const list = document.getElementById("list");
const hits = document.getElementById("hits");
const more = document.getElementById("more");
const AT_FIRST = 200; // laying out thousands at each key that is pressed would be slow
const problems = Array.from(list.children, (element) => ({
  element,
  tags: element.dataset.tags.split(" "),
  steps: element.dataset.steps,
  length: Number(element.dataset.length),
  text: null, // made when something is searched for the first time
}));
const orders = {
  "": (one, other) => number(one) - number(other),
  steps: (one, other) => Number(other.steps) - Number(one.steps) || number(one) - number(other),
  length: (one, other) => other.length - one.length || number(one) - number(other),
};
let order = "";
let limit = AT_FIRST;
let beyond = null; // the first problem that is found and not listed

function number(problem) {
  return Number(problem.element.id.slice("problem-".length));
}

function textOf(problem) {
  problem.text ??= Array.from(
    problem.element.querySelectorAll(".id, .q, .gold b, .t"),
    (part) => written(part).textContent,
  )
    .join("\n")
    .toLowerCase();
  return problem.text;
}

// Without what the report itself has put into a text.
function written(part) {
  const copy = part.cloneNode(true);
  copy.querySelectorAll(".value").forEach((value) => value.remove());
  return copy;
}

// The controls that are not in their first state, as the part of the address after "#".
function chosen() {
  const pairs = Array.from(new FormData(form)).filter(([, value]) => value.trim() !== "");
  return new URLSearchParams(pairs);
}

// Shows what is found, up to the limit, in the chosen order.
function update() {
  const wanted = chosen();
  const words = (wanted.get("find") ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  const tag = wanted.get("show");
  const steps = wanted.get("steps");
  const wantedOrder = wanted.get("sort") ?? "";
  if (wantedOrder !== order) {
    order = wantedOrder;
    list.append(...problems.sort(orders[order]).map((problem) => problem.element));
  }
  let found = 0;
  for (const problem of problems) {
    const isFound =
      (tag === null || problem.tags.includes(tag)) &&
      (steps === null || problem.steps === steps) &&
      words.every((word) => textOf(problem).includes(word));
    found += isFound;
    const isShown = isFound && found <= limit;
    if (isFound && found === limit + 1) {
      beyond = problem.element;
    }
    if (problem.element.hidden === isShown) {
      problem.element.hidden = !isShown;
    }
  }
  const noun = problems.length === 1 ? "problem" : "problems";
  const total = `${problems.length.toLocaleString("en")} ${noun}`;
  hits.textContent =
    found === problems.length ? total : `${found.toLocaleString("en")} of ${total}`;
  more.hidden = found <= limit;
  more.textContent = `Show all ${found.toLocaleString("en")}`;
}

function change() {
  limit = AT_FIRST;
  update();
}

function remember() {
  const wanted = chosen().toString();
  const address = wanted ? `#${wanted}` : location.pathname + location.search;
  history.replaceState(null, "", address);
}

// What the address asks for: "#problem-17", or "#show=wrong&find=apples".
function follow() {
  const wanted = location.hash.slice(1);
  const problem = wanted.startsWith("problem-") ? document.getElementById(wanted) : null;
  if (problem) {
    if (problem.hidden) {
      form.reset();
      limit = Infinity;
      update();
    }
    const details = problem.firstElementChild;
    details.open = true;
    problem.scrollIntoView();
    details.firstElementChild.focus({ preventScroll: true });
  } else if (wanted.includes("=")) {
    form.reset();
    for (const [name, value] of new URLSearchParams(wanted)) {
      const control = form.elements.namedItem(name);
      if (control?.name === name) {
        control.value = value;
      }
    }
    // A value that is no option, as in a link to another report, chooses nothing.
    for (const select of form.querySelectorAll("select")) {
      select.value ||= "";
    }
    change();
    remember();
    document.getElementById("problems").scrollIntoView();
  } else if (!wanted && chosen().toString()) {
    form.reset(); // back from a filter to the address without any
    change();
  }
}

form.hidden = false;
form.addEventListener("input", () => {
  change();
  remember();
});
form.addEventListener("submit", (event) => event.preventDefault());
// Not by the form's own event, which `follow` causes as well.
document.getElementById("clear").addEventListener("click", () => {
  form.reset();
  change();
  remember();
});
document.getElementById("open").addEventListener("click", () => {
  const shown = problems.filter((problem) => !problem.element.hidden);
  const isOpening = shown.some((problem) => !problem.element.firstElementChild.open);
  for (const problem of shown) {
    problem.element.firstElementChild.open = isOpening;
  }
});
more.addEventListener("click", () => {
  const next = beyond;
  limit = Infinity;
  update();
  next.querySelector("summary").focus();
});
// On paper nothing can be pressed: all that is found is there, and open.
let printing = null; // what is to be undone afterwards
window.addEventListener("beforeprint", () => {
  printing ??= { limit, opened: [] };
  limit = Infinity;
  update();
  for (const { element } of problems) {
    const details = element.firstElementChild;
    if (!element.hidden && !details.open) {
      details.open = true;
      printing.opened.push(details);
    }
  }
});
window.addEventListener("afterprint", () => {
  for (const details of printing.opened) {
    details.open = false;
  }
  limit = printing.limit;
  printing = null;
  update();
});
window.addEventListener("hashchange", follow);
window.addEventListener("load", follow); // the browser's own way to the fragment took the focus
update();
follow();
