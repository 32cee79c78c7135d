// Reading what the page holds. Strings of the data reach the page as text alone.
const $ = (id) => document.getElementById(id);

function el(tag, attributes, ...children) {
  const drawn = ["svg", "path", "rect", "line", "text", "circle", "g", "title"].includes(tag);
  const node = drawn
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const KINDS = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array };
const ABSENT = 65535;

async function readArray(name, kind) {
  const block = $("a-" + name);
  const text = atob(block.textContent);
  block.remove(); // its text is not needed twice
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new KINDS[kind](await new Response(unpacked).arrayBuffer());
}

function numbers(codes, low, high) {
  const values = new Float32Array(codes.length);
  const step = (high - low) / (ABSENT - 1);
  for (let i = 0; i < codes.length; i++) {
    values[i] = codes[i] === ABSENT ? NaN : low + codes[i] * step;
  }
  return values;
}

async function readData() {
  const header = JSON.parse($("header").textContent);
  const raw = {};
  for (const [name, kind] of Object.entries(header.arrays)) raw[name] = await readArray(name, kind);
  const data = { header, n: header.n, labels: raw.labels, region: raw.region, scores: {} };
  data.ids = new Float64Array(header.n);
  for (let i = 0, id = 0; i < header.n; i++) data.ids[i] = id += raw.ids[i];
  for (const { name, low, high } of header.scores) {
    data.scores[name] = numbers(raw["s-" + name], low, high);
  }
  data.gold = raw.gold;
  data.predicted = raw.predicted;
  if (header.other) {
    data.other = { rows: raw["o-rows"], scores: {} };
    for (const { name, low, high } of header.scores.slice(0, 3)) {
      data.other.scores[name] = numbers(raw["o-" + name], low, high);
    }
  }
  data.small = await readPicture("thumbnails");
  data.listed = await readPicture("listed");
  data.listedAt = new Map(header.hard.flatMap(([, rows]) => rows).map((row, k) => [row, k]));
  return data;
}

async function readPicture(name) {
  const block = $(name);
  if (!block) return null;
  const picture = new Image();
  picture.src = block.textContent;
  await picture.decode();
  return picture;
}

// A canvas with the image of a position, about `pixels` wide; null on a page without pictures.
function thumb(data, row, pixels) {
  const sharp = data.listed !== null && data.listedAt.has(row);
  const picture = sharp ? data.listed : data.small;
  if (picture === null) return null;
  const { side, columns } = data.header[sharp ? "listed" : "thumbnails"];
  const k = sharp ? data.listedAt.get(row) : row;
  const canvas = el("canvas", { class: "thumb", width: side, height: side, role: "img" });
  canvas.setAttribute("aria-label", `image ${data.ids[row]}, ${className(data, row)}`);
  canvas.style.width = canvas.style.height = pixels + "px";
  const [left, top] = [(k % columns) * side, Math.floor(k / columns) * side];
  canvas.getContext("2d").drawImage(picture, left, top, side, side, 0, 0, side, side);
  return canvas;
}

const className = (data, row) => data.header.classes[data.labels[row]];
const count = (n) => n.toLocaleString("en-US");
const short = (value) => (Number.isNaN(value) ? "-" : Number(value.toPrecision(3)).toString());

// [class, number of epochs] of a position, the most frequent first; empty without predictions.
function predictions(data, row) {
  if (!data.predicted) return [];
  const tally = new Map();
  for (let e = 0; e < data.header.epochs.length; e++) {
    const taken = data.predicted[e * data.n + row];
    tally.set(taken, (tally.get(taken) || 0) + 1);
  }
  return [...tally].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
}
