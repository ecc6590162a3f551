"use strict";
// The report of a batch: table of cases, one case in detail, volumes of the batch, provenance.
// All text from the batch enters the page as text nodes, never as HTML.

const ROW = 28; // height of a row, as in report.css
const ENDING = 14; // last characters of a name that stay visible: paths and UIDs differ there
const SPARE = 12; // rows that are drawn above and below the visible ones
const MM3 = 1000; // per mL
const POINTS = 400; // cases that are drawn as points; of more, a histogram is drawn
const BARS = 36;
const NONE = "none";
const ALL = "all";

const waiting = new Map(); // name of a volume → function that takes it
const volseg = {
  receive([name, content]) {
    if (name === "batch") start(content);
    else if (waiting.has(name)) waiting.get(name)(content);
  },
};

const state = {
  batch: null, cases: [], shown: [], at: -1, sort: { key: "case", down: false },
  columns: [], outlines: true, viewer: null, large: false,
};
const byId = (id) => document.getElementById(id);

function start(batch) {
  state.batch = batch;
  state.cases = batch.cases.map((row, number) => ({
    ...row, number, text: searchText(row), own: { mark: row.mark, note: row.note },
  }));
  readMarks();
  document.title = `${batch.folder.split(/[\\/]/).pop()} – volseg report`;
  byId("folder").textContent = batch.folder;
  byId("incomplete").hidden = batch.complete;
  fillStructures();
  // the cases that need a look come first, where the Dice is predicted
  if (state.cases.some((row) => row.dice !== null)) state.sort.key = "dice";
  setColumns();
  connect();
  applyFilter();
  select(state.shown.length ? 0 : -1);
  document.documentElement.dataset.ready = performance.now().toFixed(0);
}

function searchText(row) {
  return [row.case, row.message, ...row.warnings, ...Object.values(row.columns)].join("\n").toLowerCase();
}

// ---- marks -------------------------------------------------------------------------------------

const storageKey = () => `volseg-report:${state.batch.id}`;
// a mark is about one label map: that of another run does not inherit it
const markKey = (row) => `${row.case}\t${row.result}`;

function readMarks() {
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(storageKey()) || "{}");
  } catch (error) {
    tellThatMarksAreNotKept();
  }
  for (const row of state.cases) {
    const kept = stored[markKey(row)];
    row.mark = kept ? kept.mark : row.own.mark;
    row.note = kept ? kept.note : row.own.note;
  }
}

function storeMarks() {
  const marks = {};
  for (const row of state.cases) {
    if (row.mark !== row.own.mark || row.note !== row.own.note) {
      marks[markKey(row)] = { mark: row.mark, note: row.note };
    }
  }
  try {
    localStorage.setItem(storageKey(), JSON.stringify(marks));
  } catch (error) {
    tellThatMarksAreNotKept();
  }
}

function tellThatMarksAreNotKept() {
  const notice = byId("storage");
  notice.textContent = "This browser keeps no data for files: export the marks before you close the page.";
  notice.hidden = false;
}

function mark(value, goOn) {
  const row = current();
  if (!row) return;
  row.mark = row.mark === value ? "" : value;
  storeMarks();
  if (goOn && row.mark && state.at + 1 < state.shown.length) select(state.at + 1);
  else showDetail();
  drawCounts();
  drawRows();
}

function exportText() {
  // TSV has no quoting: tabs and line breaks become spaces
  const cell = (text) => String(text).replace(/[\t\r\n]+/g, " ");
  const lines = [["case", "mark", "note", "status", "result"].join("\t")];
  for (const row of state.cases) {
    if (row.mark || row.note) {
      lines.push([row.case, row.mark, row.note, row.status, row.result].map(cell).join("\t"));
    }
  }
  return `${lines.join("\n")}\n`;
}

function exportMarks() {
  const url = URL.createObjectURL(new Blob([exportText()], { type: "text/tab-separated-values" }));
  const link = element("a", { href: url, download: "marks.tsv" });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

async function importMarks(file) {
  const [head, ...lines] = (await file.text()).split(/\r?\n/).filter((line) => line !== "");
  const names = (head || "").split("\t");
  if (!["case", "mark", "note"].every((name) => names.includes(name))) {
    byId("storage").textContent = `${file.name} holds no marks: expected the columns case, mark and note.`;
    byId("storage").hidden = false;
    return;
  }
  const rows = new Map(state.cases.map((row) => [row.case, row]));
  for (const line of lines) {
    const cells = line.split("\t");
    const value = (name) => cells[names.indexOf(name)] || "";
    const row = rows.get(value("case"));
    if (!row || (value("result") && value("result") !== row.result)) continue;
    row.mark = ["pass", "fail"].includes(value("mark")) ? value("mark") : "";
    row.note = value("note");
  }
  storeMarks();
  applyFilter();
  showDetail();
}

// ---- table -------------------------------------------------------------------------------------

function fillStructures() {
  const names = state.batch.structures.map((structure, number) => [structure.name, number]);
  byId("structure").replaceChildren(
    ...[["no volume", NONE], ["all volumes", ALL], ...names].map(([name, value]) =>
      element("option", { value: String(value) }, name)),
  );
}

function setColumns() {
  const count = (list) => (list.length ? String(list.length) : "");
  const columns = [
    { key: "case", name: "Case", kind: "case", value: (row) => row.case.toLowerCase(), text: (row) => row.case },
    { key: "status", name: "Status", kind: "status", value: (row) => row.status, text: (row) => row.status,
      tone: (row) => (isFailure(row) ? "bad" : "") },
    { key: "mark", name: "Mark", kind: "mark", value: (row) => `${row.mark}${row.note ? "1" : "2"}`,
      text: (row) => `${row.mark}${row.note ? " ✎" : ""}`,
      tone: (row) => (row.mark === "pass" ? "good" : row.mark === "fail" ? "bad" : "") },
    { key: "warnings", name: "Warnings", kind: "number", value: (row) => row.warnings.length,
      text: (row) => count(row.warnings), tone: () => "warn" },
    { key: "outliers", name: "Outliers", kind: "number", value: (row) => row.outliers.length,
      text: (row) => count(row.outliers), tone: () => "warn" },
  ];
  if (state.cases.some((row) => row.dice !== null)) {
    columns.splice(3, 0, { key: "dice", name: "Pred. Dice", kind: "number", value: (row) => row.dice,
      text: (row) => (row.dice === null ? "" : row.dice.toFixed(3)) });
  }
  const choice = byId("structure").value || NONE;
  state.batch.structures.forEach((structure, number) => {
    if (choice === ALL || choice === String(number)) columns.push(volumeColumn(structure, number));
  });
  state.columns = columns;
  drawHead();
}

function volumeColumn(structure, number) {
  return {
    key: `volume${number}`, name: `${structure.name} (mL)`, kind: "number volume",
    value: (row) => (row.volumes ? row.volumes[number] : null),
    text: (row) => (row.volumes && row.volumes[number] !== null ? millilitres(row.volumes[number]) : ""),
    tone: (row) => (row.outliers.includes(number) ? "warn" : ""),
  };
}

function millilitres(mm3) {
  const value = mm3 / MM3;
  return value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : 2);
}

// Draws a part of the page again, and gives the focus to the button that takes the place of the one
// that had it
function redraw(part, draw) {
  const had = part.contains(document.activeElement) ? document.activeElement.name : "";
  draw();
  if (!had) return;
  const button = part.querySelector(`button[name="${had}"]:enabled`);
  (button || byId("grid")).focus();
}

function drawHead() {
  redraw(byId("head"), replaceHead);
}

function replaceHead() {
  byId("head").replaceChildren(...state.columns.map((column) => {
    const sorted = state.sort.key === column.key;
    const cell = element("div", { className: `cell ${column.kind || ""}`, role: "columnheader", title: column.name });
    cell.setAttribute("aria-sort", sorted ? (state.sort.down ? "descending" : "ascending") : "none");
    const arrow = sorted ? (state.sort.down ? " ↓" : " ↑") : "";
    cell.append(element("button", { type: "button", name: column.key, onclick: () => sortBy(column) },
      element("span", { className: "start" }, column.name), element("span", { className: "end" }, arrow)));
    cell.dataset.key = column.key;
    return cell;
  }));
}

function sortBy(column) {
  const again = state.sort.key === column.key;
  // numbers are of interest from the top: many warnings, large volumes
  const down = again ? !state.sort.down : Boolean(column.kind && column.kind.includes("number")) && column.key !== "dice";
  state.sort = { key: column.key, down };
  drawHead();
  applyFilter();
}

function compare(first, second) {
  if (typeof first === "string") return first < second ? -1 : first > second ? 1 : 0;
  return first - second;
}

function sortRows(rows) {
  const column = state.columns.find((item) => item.key === state.sort.key) || state.columns[0];
  const sign = state.sort.down ? -1 : 1;
  const keyed = rows.map((row) => [column.value(row), row]);
  keyed.sort(([first, one], [second, other]) => {
    // rows without a value come last in either direction
    if (first === null || second === null) return (first === null) - (second === null) || one.number - other.number;
    return sign * compare(first, second) || one.number - other.number;
  });
  return keyed.map(([, row]) => row);
}

const isFailure = (row) => !["done", "left out"].includes(row.status);

const CHOICES = {
  all: () => true,
  flagged: (row) => row.flagged || row.mark === "fail",
  warnings: (row) => row.warnings.length > 0,
  outliers: (row) => row.outliers.length > 0,
  done: (row) => row.status === "done",
  failures: isFailure,
  "left out": (row) => row.status === "left out",
  unmarked: (row) => !row.mark,
  pass: (row) => row.mark === "pass",
  fail: (row) => row.mark === "fail",
  note: (row) => row.note !== "",
};

function applyFilter() {
  const chosen = current();
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const belongs = CHOICES[byId("show").value];
  const found = state.cases.filter((row) => belongs(row) && words.every((word) => row.text.includes(word)));
  state.shown = sortRows(found);
  state.at = chosen ? state.shown.indexOf(chosen) : -1;
  byId("shown").textContent = `${state.shown.length} of ${state.cases.length} cases`;
  byId("grid").setAttribute("aria-rowcount", String(state.shown.length + 1));
  byId("rows").style.height = `${state.shown.length * ROW}px`;
  drawCounts();
  if (state.at < 0 && state.shown.length) select(0);
  else if (state.at < 0) showDetail();
  drawRows();
}

function drawRows() {
  const grid = byId("grid");
  const first = Math.max(0, Math.floor(grid.scrollTop / ROW) - SPARE);
  const last = Math.min(state.shown.length, Math.ceil((grid.scrollTop + grid.clientHeight) / ROW) + SPARE);
  const rows = [];
  for (let index = first; index < last; index += 1) rows.push(drawRow(state.shown[index], index));
  byId("rows").replaceChildren(...rows);
  grid.setAttribute("aria-activedescendant", state.at >= 0 ? `row${state.at}` : "");
}

function drawRow(row, index) {
  const line = element("div", { className: "row", role: "row", id: `row${index}`, onclick: () => select(index) });
  line.style.transform = `translateY(${index * ROW}px)`;
  line.setAttribute("aria-rowindex", String(index + 2));
  line.setAttribute("aria-selected", String(index === state.at));
  for (const column of state.columns) {
    const text = column.text(row);
    const tone = column.tone && text ? column.tone(row) : "";
    line.append(element("div", { className: `cell ${column.kind || ""} ${tone}`, role: "gridcell", title: text },
      ...(column.key === "case" ? inTwoParts(text) : [text])));
  }
  return line;
}

// Returns a name of which the middle is cut where it is too long; dots cut its end otherwise
function inTwoParts(text) {
  const letters = [...text];
  if (letters.length <= ENDING) return [text];
  return [element("span", { className: "start" }, letters.slice(0, -ENDING).join("")),
    element("span", { className: "end" }, letters.slice(-ENDING).join(""))];
}

const current = () => (state.at >= 0 ? state.shown[state.at] : null);

function select(index) {
  if (!state.shown.length) return;
  state.at = Math.max(0, Math.min(index, state.shown.length - 1));
  const grid = byId("grid");
  const top = state.at * ROW;
  const head = byId("head").offsetHeight;
  if (top < grid.scrollTop) grid.scrollTop = top;
  if (top + ROW + head > grid.scrollTop + grid.clientHeight) grid.scrollTop = top + ROW + head - grid.clientHeight;
  drawRows();
  showDetail();
}

function openCase(row) {
  if (!state.shown.includes(row)) {
    byId("filter").value = "";
    byId("show").value = "all";
    applyFilter();
  }
  showTab("cases");
  select(state.shown.indexOf(row));
}

function drawCounts() {
  const count = (test) => state.cases.filter(test).length;
  const badges = [
    [`${state.cases.length} cases`, ""],
    [`${count(CHOICES.done)} done`, "good"],
    [`${count(CHOICES.failures)} failed`, "bad"],
    [`${count(CHOICES["left out"])} left out`, ""],
    [`${count(CHOICES.flagged)} flagged`, "warn"],
    [`${count((row) => row.mark !== "")} marked`, ""],
  ];
  byId("counts").replaceChildren(
    ...badges.filter(([text]) => !/^0 (failed|left out)$/.test(text))
      .map(([text, tone]) => element("span", { className: `badge ${tone}` }, text)),
  );
}

// ---- one case ----------------------------------------------------------------------------------

function showDetail() {
  redraw(byId("detail"), replaceDetail);
}

function replaceDetail() {
  closeViewer();
  const row = current();
  const detail = byId("detail");
  if (!row) {
    detail.replaceChildren(element("p", { className: "empty" }, "No case matches the filter."));
    return;
  }
  const parts = [titleOf(row), markingOf(row)];
  if (row.message) parts.push(element("p", { className: isFailure(row) ? "message" : "message warning" }, row.message));
  for (const text of row.warnings) parts.push(element("p", { className: "message warning" }, text));
  if (row.picture_problem) parts.push(element("p", { className: "message warning" }, row.picture_problem));
  if (row.volume) parts.push(element("div", { id: "viewer-box", hidden: true }));
  if (row.mosaic || row.volume) parts.push(picturesOf(row));
  if (row.volumes) parts.push(element("h3", {}, "Volumes"), volumesOf(row));
  parts.push(element("h3", {}, "Case"), factsOf(row));
  detail.replaceChildren(...parts);
  detail.scrollTop = 0;
}

function titleOf(row) {
  const tone = isFailure(row) ? "bad" : row.status === "done" ? "good" : "";
  const title = element("div", { className: "top" }, element("h2", {}, row.case),
    element("span", { className: `badge ${tone}` }, row.status));
  if (row.dice !== null) title.append(element("span", { className: "badge" }, `predicted Dice ${row.dice.toFixed(3)}`));
  if (row.outliers.length) {
    const word = row.outliers.length === 1 ? "outlier" : "outliers";
    title.append(element("span", { className: "badge warn" }, `${row.outliers.length} ${word}`));
  }
  return title;
}

function markingOf(row) {
  const button = (value, key, name) => element("button", {
    type: "button", name: value, className: value, "aria-pressed": String(row.mark === value), onclick: () => mark(value, false),
  }, `${name} `, element("kbd", {}, key));
  const note = element("textarea", { id: "note", placeholder: "Note (n)", value: row.note, "aria-label": "Note" });
  note.oninput = () => {
    row.note = note.value;
    storeMarks();
    drawRows();
  };
  const step = (by, name, key) => element("button", {
    type: "button", name, onclick: () => select(state.at + by),
    disabled: state.at + by < 0 || state.at + by >= state.shown.length, "aria-label": name,
  }, key);
  return element("div", { className: "marking" }, step(-1, "Previous case", "‹"), step(1, "Next case", "›"),
    button("pass", "p", "Pass"), button("fail", "f", "Fail"), note);
}

function picturesOf(row) {
  const caption = element("figcaption");
  const figure = element("figure", {}, caption);
  if (row.mosaic) {
    const box = mosaicOf(row);
    figure.prepend(box);
    caption.append(
      element("button", { type: "button", id: "outlines", "aria-pressed": String(state.outlines),
        onclick: toggleOutlines }, "Outlines ", element("kbd", {}, "o")),
      sizeButton(box),
    );
  }
  if (row.volume) {
    caption.append(element("button", { type: "button", id: "open-viewer", "aria-pressed": "false",
      onclick: toggleViewer }, "Viewer ", element("kbd", {}, "v")));
  }
  const cut = state.batch.whole_head ? "" : " Only the surroundings of the labels are shown.";
  caption.append(element("span", {}, "Radiological convention: the subject's left (L) is on the right of the picture. "
    + `Numbers are positions in mm.${cut}`));
  return figure;
}

function mosaicOf(row) {
  const scan = element("img", { src: `mosaics/${row.mosaic}.webp`, alt: `Slices of ${row.case} in three planes` });
  const outlines = element("img", { src: `mosaics/${row.mosaic}_outlines.webp`, alt: "", className: "outlines" });
  outlines.hidden = !state.outlines;
  const box = element("div", { className: "mosaic", tabIndex: 0, role: "group", "aria-label": "Slices" }, scan, outlines);
  box.classList.toggle("large", state.large);
  return box;
}

function sizeButton(box) {
  const size = element("button", { type: "button", "aria-pressed": String(state.large) }, "Large");
  size.onclick = () => {
    state.large = !state.large;
    box.classList.toggle("large", state.large);
    size.setAttribute("aria-pressed", String(state.large));
  };
  return size;
}

function toggleOutlines() {
  state.outlines = !state.outlines;
  for (const picture of document.querySelectorAll(".outlines")) picture.hidden = !state.outlines;
  const button = byId("outlines");
  if (button) button.setAttribute("aria-pressed", String(state.outlines));
}

function swatch(color) {
  const box = element("span", { className: "swatch" });
  if (color) box.style.background = `rgb(${color.join(",")})`;
  else box.style.visibility = "hidden";
  return box;
}

function volumesOf(row) {
  const head = element("tr", {}, ...["Structure", "mL", "batch median", "of median"].map((name, number) =>
    element("th", { className: number ? "number" : "", scope: "col" }, name)));
  const lines = state.batch.structures.map((structure, number) => {
    const volume = row.volumes[number];
    if (volume === null) return null;
    const outlier = row.outliers.includes(number);
    const median = structure.median;
    const percent = median ? `${((100 * volume) / median).toFixed(0)} %` : "";
    const side = outlier ? (volume > median ? " ▲ outlier" : " ▼ outlier") : "";
    return element("tr", { className: outlier ? "warn" : "" },
      element("td", {}, swatch(structure.color), `${structure.name}${side}`),
      element("td", { className: "number" }, millilitres(volume)),
      element("td", { className: "number" }, median === null ? "" : millilitres(median)),
      element("td", { className: "number" }, percent));
  });
  const half = Math.ceil(lines.filter(Boolean).length / 2);
  const found = lines.filter(Boolean);
  const tables = [found.slice(0, half), found.slice(half)].filter((part) => part.length).map((part) =>
    element("table", { className: "measures" }, element("thead", {}, head.cloneNode(true)), element("tbody", {}, ...part)));
  return element("div", { className: "columns" }, ...tables);
}

function factsOf(row) {
  const facts = [["input", row.input.join("; ")], ["time", row.seconds ? `${row.seconds} s` : ""], ["ended", row.ended],
    ["label map (SHA-256)", row.result], ...Object.entries(row.columns)];
  return element("table", {}, element("tbody", {}, ...facts.filter(([, text]) => text).map(([name, text]) =>
    element("tr", {}, element("th", { scope: "row", className: "quiet" }, name), element("td", {}, text)))));
}

// ---- viewer ------------------------------------------------------------------------------------

async function toggleViewer() {
  if (state.viewer) {
    closeViewer();
    return;
  }
  const row = current();
  const box = byId("viewer-box");
  if (!row || !box) return;
  state.viewer = row;
  box.hidden = false;
  showMosaic(false);
  byId("open-viewer").setAttribute("aria-pressed", "true");
  try {
    const content = await new Promise((resolve, reject) => {
      waiting.set(row.volume, resolve);
      loadScript(`volumes/${row.volume}.js`).catch(reject);
    });
    waiting.delete(row.volume);
    if (state.viewer !== row) return; // another case was chosen meanwhile
    await openViewer(box, content);
  } catch (error) {
    box.textContent = `The viewer cannot be opened: ${error.message}`;
  }
}

function showMosaic(shown) {
  const mosaic = document.querySelector(".mosaic");
  if (mosaic) mosaic.hidden = !shown;
}

function closeViewer() {
  showMosaic(true);
  const box = byId("viewer-box");
  const canvas = box && box.querySelector("canvas");
  const context = canvas && canvas.getContext("webgl2");
  const loss = context && context.getExtension("WEBGL_lose_context");
  if (box) {
    box.replaceChildren();
    box.hidden = true;
    delete box.dataset.ready;
  }
  if (loss) loss.loseContext(); // browsers keep only some contexts at a time
  if (byId("open-viewer")) byId("open-viewer").setAttribute("aria-pressed", "false");
  state.viewer = null;
}

// ---- volumes of the batch ----------------------------------------------------------------------

function drawVolumes() {
  const panel = byId("volumes");
  const text = "Each structure's volumes in this batch. Shaded: the usual range, median and median absolute deviation "
    + "(MAD) of the logarithms; a case is an outlier where 0.6745 · (ln volume − median) / MAD is beyond ±3.5. With fewer "
    + "than 8 cases nothing is marked. An outlier is unusual in this batch, which may be the subject and not an error. "
    + "A click on a plot opens the nearest case.";
  const cards = state.batch.structures.map((structure, number) => cardOf(structure, number));
  panel.replaceChildren(element("p", { className: "quiet" }, text), element("div", { className: "cards" }, ...cards));
  for (const card of panel.querySelectorAll("canvas")) drawPlot(card);
}

function cardOf(structure, number) {
  const outliers = state.cases.filter((row) => row.outliers.includes(number));
  const canvas = element("canvas", { role: "img" });
  canvas.dataset.number = String(number);
  canvas.setAttribute("aria-label", `Volumes of ${structure.name}, ${outliers.length} outliers`);
  canvas.onclick = (event) => openNearest(canvas, number, event.offsetX / canvas.clientWidth);
  const median = structure.median === null ? "no volume" : `median ${millilitres(structure.median)} mL, ${structure.cases} cases`;
  const foot = element("div", { className: "foot" }, element("span", { className: "quiet" }, median));
  for (const row of outliers.slice(0, 4)) {
    foot.append(element("button", { type: "button", className: "link", onclick: () => openCase(row) }, row.case));
  }
  if (outliers.length > 4) foot.append(element("span", { className: "quiet" }, `and ${outliers.length - 4} more`));
  return element("div", { className: "card" }, element("h2", {}, swatch(structure.color), structure.name), canvas, foot);
}

function volumesOfStructure(number) {
  return state.cases.filter((row) => row.volumes && row.volumes[number] !== null)
    .map((row) => ({ row, value: row.volumes[number] }));
}

function plotRange(values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const room = (high - low) * 0.06 || high * 0.1 || 1;
  return [Math.max(0, low - room), high + room];
}

function extent(number) {
  let [low, high] = [Infinity, -Infinity];
  for (const { value } of volumesOfStructure(number)) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return plotRange([low, high]);
}

function openNearest(canvas, number, place) {
  const [low, high] = extent(number);
  const wanted = low + place * (high - low);
  let nearest = null;
  for (const item of volumesOfStructure(number)) {
    if (!nearest || Math.abs(item.value - wanted) < Math.abs(nearest.value - wanted)) nearest = item;
  }
  if (nearest) openCase(nearest.row);
}

function drawPlot(canvas) {
  const number = Number(canvas.dataset.number);
  const structure = state.batch.structures[number];
  const items = volumesOfStructure(number);
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = width * scale;
  canvas.height = height * scale;
  if (!items.length) return;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const [low, high] = extent(number);
  const x = (value) => ((value - low) / (high - low)) * width;
  const floor = height - 16;
  if (structure.high !== null && structure.low > 0) {
    pen.fillStyle = color("band");
    pen.fillRect(x(structure.low), 2, x(structure.high) - x(structure.low), floor - 2);
  }
  pen.fillStyle = color("bar");
  if (items.length > POINTS) drawBars(pen, items, low, high, width, floor);
  else for (const { row, value } of items) drawPoint(pen, x(value), pointHeight(row, floor), 3);
  pen.fillStyle = color("bad");
  for (const { row, value } of items) {
    if (row.outliers.includes(number)) drawPoint(pen, x(value), pointHeight(row, floor), 4);
  }
  const chosen = current();
  if (chosen && chosen.volumes && chosen.volumes[number] !== null) {
    pen.fillStyle = color("accent");
    pen.fillRect(x(chosen.volumes[number]) - 1, 0, 2, floor);
  }
  drawAxis(pen, [low, high], [width, height, floor], color);
}

// the height of a point only keeps points apart; it follows from the case's number
const pointHeight = (row, floor) => 6 + ((row.number * 0.618034) % 1) * (floor - 12);

function drawPoint(pen, x, y, radius) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fill();
}

function drawBars(pen, items, low, high, width, floor) {
  const counts = new Array(BARS).fill(0);
  for (const { value } of items) counts[Math.min(BARS - 1, Math.floor(((value - low) / (high - low)) * BARS))] += 1;
  const top = Math.max(...counts);
  counts.forEach((count, bar) => {
    const tall = (count / top) * (floor - 4);
    pen.fillRect((bar * width) / BARS + 0.5, floor - tall, width / BARS - 1, tall);
  });
}

function drawAxis(pen, [low, high], [width, height, floor], color) {
  pen.fillStyle = color("line");
  pen.fillRect(0, floor, width, 1);
  pen.fillStyle = color("quiet");
  pen.font = "11px system-ui, sans-serif";
  pen.fillText(millilitres(low), 0, height - 3);
  pen.textAlign = "center";
  pen.fillText("mL", width / 2, height - 3);
  pen.textAlign = "right";
  pen.fillText(millilitres(high), width, height - 3);
}

// ---- provenance --------------------------------------------------------------------------------

function drawOrigin() {
  byId("origin").replaceChildren(
    element("p", { className: "quiet" }, "What produced these results, from the records of the cases."),
    listOf(state.batch.run),
  );
}

function listOf(content) {
  return element("dl", {}, ...Object.entries(content).flatMap(([name, value]) =>
    [element("dt", {}, name.replaceAll("_", " ")), element("dd", {}, valueOf(value))]));
}

function valueOf(value) {
  if (Array.isArray(value) && value.every((item) => typeof item !== "object")) return value.join(" ") || "none";
  if (Array.isArray(value)) return element("div", {}, ...value.map(valueOf));
  if (value && typeof value === "object") return listOf(value);
  return value === "" || value === null ? "none" : String(value);
}

// ---- keys and tabs -----------------------------------------------------------------------------

const TABS = ["cases", "volumes", "origin"];

function showTab(name) {
  for (const tab of TABS) {
    byId(tab).hidden = tab !== name;
    byId(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
    byId(`tab-${tab}`).tabIndex = tab === name ? 0 : -1;
  }
  if (name === "cases") drawRows();
  else closeViewer();
  if (name === "volumes") drawVolumes();
  if (name === "origin") drawOrigin();
}

const pageRows = () => Math.max(1, Math.floor(byId("grid").clientHeight / ROW) - 2);

const KEYS = {
  ArrowDown: () => select(state.at + 1),
  ArrowUp: () => select(state.at - 1),
  j: () => select(state.at + 1),
  k: () => select(state.at - 1),
  PageDown: () => select(state.at + pageRows()),
  PageUp: () => select(state.at - pageRows()),
  Home: () => select(0),
  End: () => select(state.shown.length - 1),
  p: () => mark("pass", true),
  f: () => mark("fail", true),
  u: () => { if (current() && current().mark) mark(current().mark, false); },
  n: () => byId("note") && byId("note").focus(),
  o: toggleOutlines,
  v: toggleViewer,
  "/": () => byId("filter").focus(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "Escape" && typing) {
    event.target.blur();
    byId("grid").focus();
    return;
  }
  if (typing || event.target.closest(".canvas, .mosaic") && event.key.startsWith("Arrow")) return;
  if (event.key === "?") {
    toggleHelp();
    return;
  }
  if (byId("cases").hidden || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
}

function onTabKey(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const at = TABS.findIndex((tab) => `tab-${tab}` === event.target.id);
  const next = TABS[(at + step + TABS.length) % TABS.length];
  showTab(next);
  byId(`tab-${next}`).focus();
}

function toggleHelp() {
  const help = byId("help");
  help.hidden = !help.hidden;
  byId("help-button").setAttribute("aria-expanded", String(!help.hidden));
}

function connect() {
  for (const tab of TABS) {
    byId(`tab-${tab}`).onclick = () => showTab(tab);
    byId(`tab-${tab}`).onkeydown = onTabKey;
  }
  byId("help-button").onclick = toggleHelp;
  byId("filter").oninput = applyFilter;
  byId("show").onchange = applyFilter;
  byId("structure").onchange = () => {
    setColumns();
    applyFilter();
  };
  byId("export").onclick = exportMarks;
  byId("import").onchange = (event) => {
    if (event.target.files.length) importMarks(event.target.files[0]);
    event.target.value = "";
  };
  byId("grid").addEventListener("scroll", () => requestAnimationFrame(drawRows));
  window.addEventListener("resize", () => {
    drawRows();
    if (!byId("volumes").hidden) drawVolumes();
  });
  document.addEventListener("keydown", onKey);
}
