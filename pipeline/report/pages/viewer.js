"use strict";
// The viewer: a scan with its labels, drawn by NiiVue. Used by the report and by `volseg view`.

const VIEWS = { All: 3, Axial: 0, Coronal: 1, Sagittal: 2, "3D": 4 };

const GRID = 2; // of NiiVue's layouts: two by two
const HINT = "Radiological convention: the subject's left (L) is on the right. A click moves the crosshair, the mouse wheel the slice.";

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function loadScript(path) {
  return new Promise((resolve, reject) => {
    const script = element("script", { src: path });
    script.onload = () => resolve();
    script.onerror = () => reject(new Error(`${path} cannot be loaded`));
    document.head.append(script);
  });
}

let niivueScript = null;
let volsegViewer = null; // the viewer that is open, for the browser's console

// Returns the viewer once it has drawn; `content` is what viewer_volume of volseg makes.
async function openViewer(container, content) {
  const status = element("p", { className: "place", role: "status" }, "Loading …");
  const canvas = element("canvas", { tabIndex: 0 });
  canvas.setAttribute("aria-label", "Scan with its labels. A click moves the crosshair, the mouse wheel moves through slices.");
  const tools = element("div", { className: "tools" });
  container.replaceChildren(tools, element("div", { className: "canvas" }, canvas), status);
  try {
    niivueScript = niivueScript || loadScript("niivue.js");
    await niivueScript;
    if (!canvas.getContext("webgl2")) throw new Error("this browser has no WebGL 2");
    const viewer = await showVolumes(canvas, content, status);
    volsegViewer = viewer;
    addTools(tools, viewer, content);
    if (status.textContent.startsWith("Loading")) status.textContent = HINT;
    container.dataset.ready = "true";
    return viewer;
  } catch (error) {
    status.textContent = `The viewer cannot be opened: ${error.message}`;
    return null;
  }
}

async function showVolumes(canvas, content, status) {
  const viewer = new niivue.Niivue({
    isRadiologicalConvention: true,
    dragAndDropEnabled: false,
    isOrientationTextVisible: true,
    show3Dcrosshair: true,
    backColor: [0, 0, 0, 1],
    crosshairColor: [1, 0.85, 0.2, 0.7],
    crosshairWidth: 1,
    fontColor: [1, 1, 1, 1],
    fontMinPx: 15,
    showAllOrientationMarkers: true,
    multiplanarLayout: GRID,
    viewModeHotKey: "",
    clipPlaneHotKey: "",
    logLevel: "error",
  });
  viewer.onLocationChange = (place) => { status.textContent = placeText(place, content.table); };
  await viewer.attachToCanvas(canvas);
  const scan = await niivue.NVImage.loadFromBase64({
    base64: content.scan, name: "scan.nii.gz", colormap: "gray", cal_min: 0, cal_max: 255,
  });
  viewer.addVolume(scan);
  if (content.labels) {
    const labels = await niivue.NVImage.loadFromBase64({
      base64: content.labels, name: "labels.nii.gz", opacity: 0.5,
    });
    labels.setColormapLabel(labelColors(content.table));
    viewer.addVolume(labels);
  }
  viewer.setSliceType(VIEWS.All);
  viewer.drawScene();
  return viewer;
}

function labelColors(table) {
  const channel = (number) => [0, ...table.map(([, color]) => color[number])];
  return {
    R: channel(0), G: channel(1), B: channel(2),
    A: [0, ...table.map(() => 255)],
    I: [0, ...table.map((_, number) => number + 1)],
    labels: ["", ...table.map(([name]) => name)],
  };
}

function placeText(place, table) {
  const mm = Array.from(place.mm || []).slice(0, 3).map((value, axis) => {
    const letter = value >= 0 ? "RAS"[axis] : "LPI"[axis];
    return `${letter} ${Math.abs(value).toFixed(1)}`;
  });
  const number = place.values && place.values.length > 1 ? Math.round(place.values[1].value) : 0;
  const name = number > 0 && table[number - 1] ? table[number - 1][0] : "no label";
  return `${mm.join("  ")} mm   ${table.length ? name : ""}`;
}

function addTools(tools, viewer, content) {
  const buttons = Object.entries(VIEWS).map(([name, view]) => {
    const button = element("button", { type: "button", "aria-pressed": String(view === VIEWS.All) }, name);
    button.onclick = () => {
      viewer.setSliceType(view);
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    };
    return button;
  });
  tools.append(...buttons);
  if (!content.labels) return;
  const opacity = element("input", { type: "range", min: 0, max: 1, step: 0.05, value: 0.5 });
  opacity.oninput = () => viewer.setOpacity(1, Number(opacity.value));
  const outline = element("input", { type: "checkbox" });
  outline.onchange = () => viewer.setAtlasOutline(outline.checked ? 1 : 0);
  tools.append(element("label", {}, "Labels ", opacity), element("label", {}, outline, " outlines only"));
}
