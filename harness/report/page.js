// SPDX-License-Identifier: GPL-2.0-or-later
// The page says everything without this; it adds finding, copying, and printing unfolded.
"use strict";

for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

const filter = document.querySelector("form.filter");
let unfilter = () => {};
if (filter) {
  const words = filter.querySelector("input[type=search]");
  const group = filter.querySelector("select");
  const boxes = [...filter.querySelectorAll("input[type=checkbox]")];
  const shown = filter.querySelector(".shown");
  const all = filter.querySelector("button");
  const items = [...document.querySelectorAll("[data-at]")].map((element) => ({
    element,
    at: element.dataset.at.split(" ").map((pair) => pair.split(":")),
    groups: element.dataset.groups.split(" "),
  }));
  const rows = items.filter((item) => item.element.matches(".row"));
  const folds = [...document.querySelectorAll(".group")];
  const wereOpen = new Map(folds.map((fold) => [fold, fold.open]));
  const kinds = new Set(boxes.filter((box) => box.name === "verdict").map((box) => box.value));
  let before = false;
  const apply = () => {
    const wanted = words.value.trim().toLowerCase();
    const off = new Set(boxes.filter((box) => !box.checked).map((box) => `${box.name} ${box.value}`));
    const narrowed = wanted !== "" || group.value !== "" || off.size > 0;
    // A verdict without a box, such as that of a target where it is another, follows the rest.
    const some = [...kinds].some((kind) => !off.has(`verdict ${kind}`));
    const fits = ([target, kind]) => !off.has(`target ${target}`) &&
      (kinds.has(kind) ? !off.has(`verdict ${kind}`) : some);
    for (const item of items) {
      // Long: read when it is first searched.
      if (wanted) item.text ??= item.element.textContent.toLowerCase();
      item.element.hidden = !(item.at.some(fits) && (!group.value || item.groups.includes(group.value)) &&
        (!wanted || item.text.includes(wanted)));
    }
    for (const fold of folds) {
      const any = fold.querySelector(".row:not([hidden])") !== null;
      fold.hidden = narrowed && !any;
      if (narrowed) fold.open = any; else if (before) fold.open = wereOpen.get(fold);
    }
    for (const section of document.querySelectorAll("section:has([data-at])")) {
      section.classList.toggle("empty", !section.querySelector("[data-at]:not([hidden])"));
    }
    const hits = rows.filter((item) => !item.element.hidden).length;
    shown.textContent = narrowed ? `${hits} of ${rows.length} clauses` : "";
    all.hidden = !narrowed;
    before = narrowed;
  };
  unfilter = () => { filter.reset(); apply(); };
  filter.hidden = false;
  filter.addEventListener("submit", (event) => event.preventDefault());
  filter.addEventListener("input", apply);
  filter.addEventListener("change", apply);
  filter.addEventListener("reset", () => setTimeout(apply));
  // A browser may have kept what was chosen before the page was loaded again.
  apply();
}

// A link to something folded or filtered out shows it.
const reveal = () => {
  const aim = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!aim) return;
  if (aim.closest("[hidden]")) unfilter();
  for (let at = aim; at; at = at.parentElement) {
    if (at.tagName === "DETAILS") at.open = true;
  }
  const whole = aim.querySelector(":scope > .whole");
  if (whole) whole.open = true;
  aim.scrollIntoView();
};
addEventListener("hashchange", reveal);
reveal();

// Paper cannot be unfolded.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const fold of opened) fold.open = true;
});
addEventListener("afterprint", () => {
  for (const fold of opened) fold.open = false;
});
