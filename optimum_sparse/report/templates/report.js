"use strict";
(() => {
  const data = document.getElementById("levels");
  if (!data) return;
  const pictures = JSON.parse(data.textContent).map((picture) => ({
    ...picture,
    levels: Int8Array.from(atob(picture.levels), (character) => character.charCodeAt(0)),
  }));
  const get = (id) => document.getElementById(id);
  const canvas = get("canvas"), context = canvas.getContext("2d");
  // What is seen: `across` columns from (left, top) on, as many rows as fit.
  let picture, left = 0, top = 0, across = 0;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
  const size = () => canvas.width / across;
  const clamp = (value, most) => Math.min(Math.max(value, 0), Math.max(most, 0));

  function draw() {
    across = Math.min(Math.max(across, 8), picture.columns);
    left = clamp(left, picture.columns - across);
    top = clamp(top, picture.rows - canvas.height / size());
    const side = size(), weights = get("what").value === "weights";
    const gap = side > 10 ? 1.5 : 0;
    context.fillStyle = colour("ground");
    context.fillRect(0, 0, canvas.width, canvas.height);
    const positive = colour("accent"), negative = weights ? colour("second") : positive;
    for (let row = Math.floor(top); row < picture.rows && (row - top) * side < canvas.height; row++)
      for (let column = Math.floor(left); column < picture.columns && (column - left) * side < canvas.width; column++) {
        const level = picture.levels[row * picture.columns + column];
        if (!level) continue;
        context.globalAlpha = weights ? 0.15 + 0.85 * Math.abs(level) / 127 : 1;
        context.fillStyle = level > 0 ? positive : negative;
        context.fillRect((column - left) * side + gap, (row - top) * side + gap, side - 2 * gap, side - 2 * gap);
      }
    context.globalAlpha = 1;
    if (picture.group && side >= 12) {
      context.strokeStyle = colour("ink");
      context.lineWidth = 2;
      for (let column = 0; column <= picture.columns; column += picture.group) {
        const x = (column - left) * side;
        context.beginPath();
        context.moveTo(x, 0);
        context.lineTo(x, Math.min((picture.rows - top) * side, canvas.height));
        context.stroke();
      }
    }
    canvas.setAttribute("aria-label", `${weights ? "Weights" : "Mask"} of ${picture.name}, ` +
      `columns ${Math.floor(left)} to ${Math.ceil(left + across) - 1} from row ${Math.floor(top)} on`);
    canvas.dataset.drawn = `${picture.name} ${left} ${top} ${across}`;
  }

  function choose() {
    picture = pictures[get("which").value];
    canvas.height = Math.round(Math.min(picture.rows / picture.columns, 1) * canvas.width);
    [left, top, across] = [0, 0, picture.columns];
    get("cell").textContent = "";
    draw();
  }

  function zoom(factor) {
    const middle = left + across / 2, center = top + canvas.height / size() / 2;
    across = Math.min(Math.max(across * factor, 8), picture.columns);
    left = middle - across / 2;
    top = center - canvas.height / size() / 2;
    draw();
  }

  function move(columns, rows) {
    left += columns;
    top += rows;
    draw();
  }

  function point(event) {
    const side = canvas.getBoundingClientRect().width / across;
    const column = Math.floor(left + event.offsetX / side), row = Math.floor(top + event.offsetY / side);
    if (column < 0 || row < 0 || column >= picture.columns || row >= picture.rows) return;
    const level = picture.levels[row * picture.columns + column];
    const weight = Math.abs(level) === 127 ? `${level > 0 ? "≥" : "≤"} ${(level * picture.scale / 127).toPrecision(3)}`
      : `≈ ${(level * picture.scale / 127).toPrecision(3)}`;
    get("cell").textContent = `output ${row}, input ${column}: ${level ? weight : "pruned"}`;
  }

  get("which").addEventListener("change", choose);
  get("what").addEventListener("change", draw);
  get("closer").addEventListener("click", () => zoom(0.5));
  get("farther").addEventListener("click", () => zoom(2));
  get("whole").addEventListener("click", choose);
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) {
      const side = canvas.getBoundingClientRect().width / across;
      move(-event.movementX / side, -event.movementY / side);
    }
    point(event);
  });
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    point(event);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = Math.max(across / 8, 1);
    const keys = {
      ArrowLeft: () => move(-step, 0), ArrowRight: () => move(step, 0), ArrowUp: () => move(0, -step),
      ArrowDown: () => move(0, step), "+": () => zoom(0.5), "-": () => zoom(2),
    };
    if (keys[event.key]) {
      keys[event.key]();
      event.preventDefault();
    }
  });
  for (const query of ["(prefers-color-scheme: dark)", "print"])
    matchMedia(query).addEventListener("change", draw);
  choose();
})();
