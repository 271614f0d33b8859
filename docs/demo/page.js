// The page: a board to draw on, and two models that read it.
"use strict";

const board = document.getElementById("board");
const pen = board.getContext("2d", { willReadFrequently: true });
const state = document.getElementById("state");
const models = [];

function clear() {
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, board.width, board.height);
  models.forEach((each) => show(each, null));
}

function show(model, found) {
  const best = found ? found.indexOf(Math.max(...found)) : -1;
  model.rows.forEach(({ row, bar, text }, digit) => {
    row.className = digit === best ? "best" : "";
    bar.style.width = found ? `${100 * found[digit]}%` : "0";
    text.textContent = found ? `${(100 * found[digit]).toFixed(1)} %` : "";
  });
  model.section.dataset.answer = best;
}

async function readBoard() {
  const pixels = pen.getImageData(0, 0, board.width, board.height).data;
  const light = Float32Array.from({ length: board.width * board.height }, (_, i) => pixels[4 * i] / 255);
  const image = reader.shrink(light, board.width);
  if (image === null) return;
  for (const model of models) {
    const start = performance.now();
    const found = await reader.read(ort, model.session, image);
    model.time.textContent = `${(performance.now() - start).toFixed(1)} ms`;
    show(model, found);
  }
}

async function openModel(section) {
  const answer = await fetch(section.dataset.model);
  if (!answer.ok) throw new Error(`${section.dataset.model}: ${answer.status}; see docs/recipes/web.md`);
  const bytes = new Uint8Array(await answer.arrayBuffer());
  const session = await ort.InferenceSession.create(bytes);
  const facts = section.appendChild(document.createElement("p"));
  facts.className = "facts";
  facts.append(`${Math.round(bytes.length / 1000)} kB, `);
  const time = facts.appendChild(document.createElement("span"));
  const table = section.appendChild(document.createElement("table"));
  const rows = Array.from({ length: 10 }, (_, digit) => {
    const row = table.insertRow();
    const head = row.appendChild(document.createElement("th"));
    head.textContent = digit;
    const bar = row.insertCell().appendChild(document.createElement("div"));
    bar.className = "bar";
    return { row, bar, text: row.insertCell() };
  });
  return { section, session, rows, time };
}

function draw(event) {
  if (!(event.buttons & 1)) return;
  const scale = board.width / board.clientWidth;
  const [x, y] = [event.offsetX * scale, event.offsetY * scale];
  pen.lineTo(x, y);
  pen.stroke();
  pen.beginPath();
  pen.moveTo(x, y);
}

board.addEventListener("pointerdown", (event) => {
  board.setPointerCapture(event.pointerId);
  pen.beginPath();
  draw(event);
});
board.addEventListener("pointermove", draw);
board.addEventListener("pointerup", readBoard);
document.getElementById("clear").addEventListener("click", clear);

(async () => {
  try {
    if (typeof ort === "undefined") throw new Error("onnxruntime-web is not there; see docs/recipes/web.md");
    // One thread needs no special headers of the server.
    ort.env.wasm.numThreads = 1;
    Object.assign(pen, { lineWidth: 26, lineCap: "round", lineJoin: "round", strokeStyle: "#fff" });
    for (const section of document.querySelectorAll("[data-model]")) models.push(await openModel(section));
    clear();
    state.textContent = "Ready.";
  } catch (error) {
    state.textContent = error.message;
  }
})();
