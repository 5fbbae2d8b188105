// The drawing becomes a scan of 8×8 pixels, as in the data set, and digits.onnx turns it into probabilities and maps.

const SIDE = 32; // pixels of the black and white bitmap that the data set's scans count, 4×4 for each of theirs
const PEN = 5; // width of the pen in that bitmap
const MARGIN = PEN / 2; // the scans of the data set fill their height
const FIGURES = [["image", "the scan, enlarged"], ["layer1", "gate of stage 1"], ["layer2", "gate of stage 2"],
                 ["layer3", "gate of stage 3"]];

const pad = document.getElementById("pad");
const answer = document.getElementById("answer");
const pen = pad.getContext("2d");
const bitmap = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE }).getContext("2d", { willReadFrequently: true });
let strokes = [];
let drawing = false; // the pointer is down
let session = null;
let busy = false;
let stale = false; // the drawing changed while the network ran

function drawLines(context, lines, width) {
  context.lineWidth = width;
  context.lineCap = context.lineJoin = "round";
  context.strokeStyle = "#fff";
  for (const line of lines) {
    context.beginPath();
    context.moveTo(line[0][0], line[0][1]);
    for (const [x, y] of line.length > 1 ? line.slice(1) : [[line[0][0] + 0.01, line[0][1]]]) context.lineTo(x, y);
    context.stroke();
  }
}

// Scale the drawing to the height of a scan, keep its proportions and centre it. Its pen is as wide for large digits as for small.
function toScan() {
  const points = strokes.flat();
  const [left, right] = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
  const [top, bottom] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
  const scale = (SIDE - 2 * MARGIN) / Math.max(right - left, bottom - top, 40);
  const place = ([x, y]) => [SIDE / 2 + (x - (left + right) / 2) * scale, SIDE / 2 + (y - (top + bottom) / 2) * scale];
  bitmap.clearRect(0, 0, SIDE, SIDE);
  drawLines(bitmap, strokes.map((line) => line.map(place)), PEN);
  const alpha = bitmap.getImageData(0, 0, SIDE, SIDE).data;
  const scan = new Float32Array(64);
  for (let y = 0; y < SIDE; y++) {
    for (let x = 0; x < SIDE; x++) {
      if (alpha[4 * (y * SIDE + x) + 3] > 127) scan[(y >> 2) * 8 + (x >> 2)] += 1;
    }
  }
  return scan;
}

async function update() {
  if (busy || !session) {
    stale = true;
    return;
  }
  busy = true;
  stale = false;
  try {
    if (strokes.length) {
      const scan = new ort.Tensor("float32", toScan(), [8, 8]);
      show(await session.run({ scan }));
    } else {
      empty();
    }
  } finally {
    busy = false;
  }
  if (stale) requestAnimationFrame(update);
}

function show(results) {
  const shares = results.probabilities.data;
  const best = shares.indexOf(Math.max(...shares));
  document.querySelectorAll("#bars li").forEach((row, digit) => {
    row.classList.toggle("first", digit === best);
    row.querySelector(".bar").style.width = `${100 * shares[digit]}%`;
    row.querySelector(".share").textContent = `${(100 * shares[digit]).toFixed(1)} %`;
  });
  if (!drawing) answer.textContent = `${shares[best] < 0.6 ? "Perhaps" : "It is"} a ${best} (${(100 * shares[best]).toFixed(0)} %).`;
  for (const [name, title] of FIGURES) paint(name, title, results[name]);
}

function empty() {
  document.querySelectorAll("#bars li").forEach((row) => {
    row.classList.remove("first");
    row.querySelector(".bar").style.width = "0";
    row.querySelector(".share").textContent = "";
  });
  answer.textContent = "Draw a digit from 0 to 9.";
  for (const [name, title] of FIGURES) {
    const figure = document.getElementById(`map-${name}`);
    figure.querySelector("canvas").getContext("2d").clearRect(0, 0, 32, 32);
    figure.querySelector("figcaption").textContent = title;
  }
}

function paint(name, title, tensor) {
  const [height, width] = tensor.dims;
  const [low, high] = [Math.min(...tensor.data), Math.max(...tensor.data)];
  const figure = document.getElementById(`map-${name}`);
  const canvas = figure.querySelector("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  tensor.data.forEach((value, i) => {
    const level = high > low ? (value - low) / (high - low) : 0;
    pixels.data.set(name === "image" ? [255 * value, 255 * value, 255 * value, 255] : heat(level), 4 * i);
  });
  context.putImageData(pixels, 0, 0);
  const range = name === "image" ? "" : `, ${low.toFixed(2)} to ${high.toFixed(2)}`;
  figure.querySelector("figcaption").textContent = `${title}, ${height}×${width}${range}`;
}

// Dark blue, green, yellow: ordered by lightness, so that it also reads without colour.
const STOPS = [[24, 15, 70], [35, 84, 137], [32, 148, 134], [112, 200, 92], [250, 230, 60]];
function heat(level) {
  const at = level * (STOPS.length - 1);
  const i = Math.min(Math.floor(at), STOPS.length - 2);
  return [...STOPS[i].map((value, c) => value + (at - i) * (STOPS[i + 1][c] - value)), 255];
}

function point(event) {
  const box = pad.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * pad.width, ((event.clientY - box.top) / box.height) * pad.height];
}

function begin(event) {
  if (event.button) return;
  pad.setPointerCapture(event.pointerId);
  drawing = true;
  strokes.push([point(event)]);
  drawLines(pen, strokes.slice(-1), 44);
  update();
}

function move(event) {
  if (!drawing) return;
  const line = strokes.at(-1);
  for (const each of event.getCoalescedEvents?.() ?? [event]) line.push(point(each));
  drawLines(pen, [line], 44);
  update();
}

function end() {
  if (!drawing) return;
  drawing = false;
  update();
}

function clear() {
  strokes = [];
  drawing = false;
  pen.clearRect(0, 0, pad.width, pad.height);
  update();
}

function build() {
  const bars = document.getElementById("bars");
  for (let digit = 0; digit < 10; digit++) {
    const row = document.createElement("li");
    row.innerHTML = `<span>${digit}</span><div class="track"><div class="bar"></div></div><span class="share"></span>`;
    bars.append(row);
  }
  for (const [name, title] of FIGURES) {
    const figure = document.createElement("figure");
    figure.id = `map-${name}`;
    figure.innerHTML = `<canvas width="32" height="32"></canvas><figcaption>${title}</figcaption>`;
    document.getElementById("maps").append(figure);
  }
  pad.addEventListener("pointerdown", begin);
  pad.addEventListener("pointermove", move);
  pad.addEventListener("pointerup", end);
  pad.addEventListener("pointercancel", end);
  document.getElementById("clear").addEventListener("click", clear);
}

let ort = null;
async function load() {
  try {
    ort = await import("./runtime/ort.wasm.bundle.min.mjs");
  } catch {
    answer.textContent = "This copy of the site lacks ONNX Runtime. Install Node.js with npm, then run `make docs` again.";
    return;
  }
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: new URL("runtime/ort-wasm-simd-threaded.wasm", location.href).href };
  try {
    session = await ort.InferenceSession.create("digits.onnx", { executionProviders: ["wasm"] });
  } catch (error) {
    answer.textContent = `This browser cannot run the network: ${error.message}`;
    return;
  }
  document.body.dataset.ready = "true";
  update();
}

build();
load();
