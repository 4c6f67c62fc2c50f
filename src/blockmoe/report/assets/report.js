"use strict";
// Sorting, filtering and hovering; without it every table is still there, in order.

const tip = document.createElement("div");
tip.id = "tip";
tip.setAttribute("role", "tooltip");
tip.hidden = true;
document.body.append(tip);

for (const table of document.querySelectorAll("table[data-sortable]")) {
  makeSortable(table);
  if (table.tBodies[0].rows.length > 12) makeFilter(table);
}
for (const table of document.querySelectorAll("table")) makeTips(table);

function makeSortable(table) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const next = now === null ? "ascending" : now === "ascending" ? "descending" : null;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      if (next) head.setAttribute("aria-sort", next);
      const rows = next ? [...original].sort((a, b) => compare(a.cells[column], b.cells[column], next)) : original;
      body.append(...rows);
    });
  });
}

function compare(a, b, direction) {
  const x = a.dataset.value ?? "", y = b.dataset.value ?? "";
  if (x === "" || y === "") return (x === "") - (y === "");  // unknown values stay last either way
  const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
  return direction === "ascending" ? order : -order;
}

function makeFilter(table) {
  const line = document.createElement("label");
  line.className = "filter";
  const input = document.createElement("input");
  input.type = "search";
  input.placeholder = "T, workload, verdict …";
  const count = document.createElement("span");
  count.className = "soft";
  count.setAttribute("aria-live", "polite");
  line.append("Filter rows", input, count);
  table.closest(".scroll").before(line);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const cells = [...row.cells].map((cell) => cell.textContent.trim().toLowerCase());
      // A number means the whole of a cell, a word any part of one.
      row.hidden = !words.every((word) => cells.some((text) => (/^\d+$/.test(word) ? text === word : text.includes(word))));
      shown += !row.hidden;
    }
    count.textContent = words.length ? `${shown} of ${table.tBodies[0].rows.length}` : "";
  });
}

function makeTips(table) {
  const cells = [...table.querySelectorAll("td[data-tip]")];
  if (!cells.length) return;
  cells.forEach((cell, place) => {
    cell.tabIndex = place === 0 ? 0 : -1;  // one stop for the whole table; arrows move inside
    cell.removeAttribute("title");
    cell.addEventListener("mouseenter", () => showTip(cell));
    cell.addEventListener("mouseleave", hideTip);
    cell.addEventListener("focus", () => showTip(cell));
    cell.addEventListener("blur", hideTip);
  });
  table.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hideTip();
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || !event.target.dataset.tip) return;
    let [row, column] = [event.target.parentElement, event.target.cellIndex];
    let next = null;
    do {
      if (step[0]) row = step[0] > 0 ? row.nextElementSibling : row.previousElementSibling;
      column += step[1];
      next = row && !row.hidden ? row.cells[column] : null;
    } while (row && column >= 0 && column < row.cells.length && !(next && next.dataset.tip));
    if (!next || !next.dataset.tip) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

function showTip(cell) {
  tip.textContent = cell.dataset.tip;
  const store = document.getElementById(cell.closest("table").dataset.samples ?? "");
  const blocks = store && cell.dataset.key ? samplesOf(store)[cell.dataset.key] : null;
  if (blocks) tip.append(strip(blocks));
  tip.hidden = false;
  const box = cell.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = box.bottom + tip.offsetHeight + 8 < window.innerHeight;
  tip.style.left = `${Math.max(8, left) + window.scrollX}px`;
  tip.style.top = `${(below ? box.bottom + 4 : Math.max(4, box.top - tip.offsetHeight - 4)) + window.scrollY}px`;
}

function hideTip() {
  tip.hidden = true;
}

const parsed = new Map();
function samplesOf(store) {
  if (!parsed.has(store)) parsed.set(store, JSON.parse(store.textContent));
  return parsed.get(store);
}

// Samples in the order of time, a column a block.
function strip(blocks) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 300 60");
  svg.setAttribute("aria-hidden", "true");
  const all = blocks.flat();
  const low = Math.min(...all), high = Math.max(...all);
  blocks.forEach((block, i) => {
    for (const [j, sample] of block.entries()) {
      const dot = document.createElementNS(space, "circle");
      dot.setAttribute("cx", 6 + (288 * (i + (j + 0.5) / block.length)) / blocks.length);
      dot.setAttribute("cy", high > low ? 54 - (48 * (sample - low)) / (high - low) : 30);
      dot.setAttribute("r", 2);
      dot.setAttribute("fill", i % 2 ? "var(--soft)" : "var(--win)");
      svg.append(dot);
    }
  });
  return svg;
}
