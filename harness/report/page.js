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
if (filter) {
  const words = filter.querySelector("input[type=search]");
  const boxes = [...filter.querySelectorAll("input[type=checkbox]")];
  const shown = filter.querySelector(".shown");
  const rows = [...document.querySelectorAll(".row")];
  const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const wereOpen = new Map([...document.querySelectorAll(".group")].map((g) => [g, g.open]));
  const apply = () => {
    const wanted = words.value.trim().toLowerCase();
    const kinds = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const narrowed = wanted !== "" || kinds.size < boxes.length;
    let hits = 0;
    for (const row of rows) {
      const kind = boxes.some((box) => box.value === row.classList[1]);
      row.hidden = (kind && !kinds.has(row.classList[1])) || !text.get(row).includes(wanted);
      hits += !row.hidden;
    }
    for (const [group, open] of wereOpen) {
      const any = group.querySelector(".row:not([hidden])") !== null;
      group.hidden = narrowed && !any;
      group.open = narrowed ? any : open;
    }
    shown.textContent = narrowed ? `${hits} of ${rows.length}` : "";
  };
  filter.hidden = false;
  filter.addEventListener("submit", (event) => event.preventDefault());
  filter.addEventListener("input", apply);
}

// A link to a clause unfolds its group.
const unfold = () => {
  const aim = location.hash && document.getElementById(location.hash.slice(1));
  for (let at = aim; at; at = at.parentElement) {
    if (at.tagName === "DETAILS") at.open = true;
  }
  const whole = aim && aim.querySelector(":scope > .whole");
  if (whole) whole.open = true;
  if (aim) aim.scrollIntoView();
};
addEventListener("hashchange", unfold);
unfold();

addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll(".group, .whole, .whole > details")) fold.open = true;
});
