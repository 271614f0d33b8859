// What the page and its test under node share: pixels to the model's input, and its answer.
"use strict";

(function (share) {
  const SIZE = 16;

  // Brightness in [0, 1], a square of `side` rows, to the model's 16 x 16: the drawing fills the
  // height, in the middle, as the digits that it was trained on do. Null if nothing is drawn.
  function shrink(light, side) {
    let [top, bottom, left, right] = [side, -1, side, -1];
    for (let y = 0; y < side; y++)
      for (let x = 0; x < side; x++)
        if (light[y * side + x] > 0.2) {
          [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
          [left, right] = [Math.min(left, x), Math.max(right, x)];
        }
    if (bottom < 0) return null;
    const span = Math.max(bottom - top, right - left) + 1;
    const [y0, x0] = [(top + bottom + 1 - span) / 2, (left + right + 1 - span) / 2];
    const image = new Float32Array(SIZE * SIZE);
    for (let y = 0; y < SIZE; y++)
      for (let x = 0; x < SIZE; x++)
        image[y * SIZE + x] = mean(light, side, y0, x0, span / SIZE, y, x);
    return image;
  }

  // Mean of the pixels below one of the model's; outside of the drawing it is dark.
  function mean(light, side, y0, x0, step, y, x) {
    let [sum, count] = [0, 0];
    for (let v = Math.floor(y0 + y * step); v < Math.max(y0 + (y + 1) * step, 1 + y0 + y * step); v++)
      for (let u = Math.floor(x0 + x * step); u < Math.max(x0 + (x + 1) * step, 1 + x0 + x * step); u++) {
        if (v >= 0 && u >= 0 && v < side && u < side) sum += light[v * side + u];
        count += 1;
      }
    return sum / count;
  }

  // Ten probabilities for an image of 16 x 16.
  async function read(ort, session, image) {
    const found = await session.run({ image: new ort.Tensor("float32", image, [1, 1, SIZE, SIZE]) });
    const logits = Array.from(found.logits.data);
    const raised = logits.map((each) => Math.exp(each - Math.max(...logits)));
    const total = raised.reduce((a, b) => a + b);
    return raised.map((each) => each / total);
  }

  share.reader = { SIZE, shrink, read };
})(typeof module === "undefined" ? window : module.exports);
