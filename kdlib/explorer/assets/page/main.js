// The page: what is shown, hidden and selected, and the controls that change it.
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779",
  "#6ece58", "#b5de2b", "#dce319"];
const VIRIDIS_ON_DARK = ["#8d6ad0", "#7f7fd6", "#6d90d8", "#56a0d0", "#3fb0c0", "#2fbfa6", "#4ccf86",
  "#7fdb62", "#bfe53f", "#f0ee3c"];
const KINDS_OF = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c6d31",
  "#7b4173", "#637939", "#ad494a", "#5254a3", "#17a3a3", "#a55194", "#bd9e39", "#6b6ecf", "#393b79",
  "#8ca252", "#d6616b", "#ce6dbd", "#9c9ede"];
const REGION_COLOURS = ["#0072B2", "#E69F00", "#D55E00"];
const PAGE = 60;

function start(data) {
  const { header, n } = data;
  const names = header.scores.map((score) => score.name);
  const byName = Object.fromEntries(header.scores.map((score) => [score.name, score]));
  const mask = new Uint32Array(n); // a bit for each filter that hides an image
  const chosen = new Uint8Array(n);
  const at = new Map(); // example id -> position, made when it is asked for
  const histograms = new Map(); // score -> [histogram, bit]
  let [selected, pageNumber] = [new Uint32Array(0), 0];

  // Words
  $("main").hidden = false; // maps take their size from it
  document.title = `${header.name}: datamap`;
  $("title").textContent = `${header.name}: datamap`;
  const { sentences } = header;
  $("about").append(...sentences.map.map((line) => el("p", {}, line)));
  $("regions").textContent = sentences.regions.join(" ");
  $("hard-text").append(...sentences.hard.map((line) => el("p", {}, line)));
  $("remarks").append(...header.remarks.map((line) => el("li", {}, line)));
  if (header.results) showResults(header.results);
  $("to-results").hidden = !header.results;

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const ramp = () => (dark.matches ? VIRIDIS_ON_DARK : VIRIDIS);

  // Images
  function image(row, score) {
    const taken = predictions(data, row).find(([k]) => k !== data.labels[row]);
    const about = [el("span", {}, className(data, row))];
    if (taken) {
      const text = `as ${header.classes[taken[0]]}: ${taken[1]}\u00d7`;
      about.push(el("span", { class: "taken" }, text));
    }
    about.push(el("span", { class: "quiet" }, short(data.scores[score][row])));
    const picture = thumb(data, row, 64);
    const button = el("button", { type: "button", class: "image" }, picture, ...about);
    const more = taken ? `, taken for ${header.classes[taken[0]]} in ${taken[1]} of ` +
      `${header.epochs.length} epochs` : "";
    button.title = `image ${data.ids[row]}: ${className(data, row)}${more}; ${score} ` +
      short(data.scores[score][row]);
    button.addEventListener("click", () => inspect(row));
    button.addEventListener("focus", () => inspect(row));
    return button;
  }

  for (const [label, rows] of header.hard) {
    const all = data.labels.reduce((m, k, i) => m + (k === label && data.region[i] === 2), 0);
    const title = el("h3", {}, header.classes[label], el("div", { class: "hint" }, `${count(all)} hard-to-learn`));
    const box = el("div", { class: "images" }, ...rows.map((row) => image(row, "confidence")));
    $("hard-list").append(el("div", { class: "hard-class" }, title, box));
  }
  if (header.hard.length) {
    const also = data.predicted ? "the other class that was predicted most often, with its number " +
      `of the ${header.epochs.length} epochs shown, and ` : "";
    $("hard-list").prepend(el("p", { class: "hint" }, "The images of each class that were hardest to learn. Below an " +
      `image: its label, ${also}its confidence. Choose one to see how it was learnt.`));
  }

  function inspect(row) {
    for (const map of maps) map.mark(map.position(row));
    if (row < 0) return;
    const taken = predictions(data, row);
    const scores = names.flatMap((name) => [
      el("dt", { title: byName[name].meaning }, name), el("dd", {}, short(data.scores[name][row]))]);
    const words = taken.length
      ? "Predicted: " + taken.slice(0, 4).map(([k, m]) => `${header.classes[k]} in ${m}`).join(", ") +
        ` of ${header.epochs.length} epochs.`
      : "";
    $("detail").replaceChildren(
      ...[el("b", {}, `image ${data.ids[row]}: ${className(data, row)}`),
        el("span", { class: "quiet" }, ` (${header.regions[data.region[row]]})`),
        thumb(data, row, 128), data.gold ? el("div", { class: "quiet" }, "probability of its label") : null,
        data.gold ? curve(data, row) : null, words ? el("p", {}, words) : null,
        el("dl", {}, ...scores)].filter((node) => node !== null));
  }

  // Maps
  const on = (positions) => ({
    lasso: (found, how) => select(found.map((k) => positions(k)), how),
    point: (k) => k >= 0 && inspect(positions(k)),
    choose: (k) => (select([positions(k)], "replace"), inspect(positions(k))),
  });
  const maps = [new DataMap($("maps"), header.other ? header.name : "", n, on((k) => k))];
  maps[0].position = (row) => row;
  maps[0].rows = null;
  maps[0].scores = data.scores;
  if (data.other) {
    const { rows, scores } = data.other;
    const map = new DataMap($("maps"), header.other.name, rows.length, on((k) => rows[k]));
    const back = new Int32Array(n).fill(-1);
    rows.forEach((row, k) => (back[row] = k));
    Object.assign(map, { position: (row) => (row < 0 ? -1 : back[row]), rows, scores });
    maps.push(map);
  }

  function colours(map) {
    const name = $("colour").value;
    const of = (values) => (map.rows ? Float32Array.from(map.rows, (row) => values[row])
      : Float32Array.from(values));
    if (name === "class") {
      const values = of(data.labels).map((k) => k % KINDS_OF.length);
      return { values, palette: KINDS_OF, continuous: false };
    }
    if (name === "region") {
      return { values: of(data.region), palette: REGION_COLOURS, continuous: false };
    }
    const { low, high } = byName[name];
    const values = map.scores[name] ? Float32Array.from(map.scores[name]) : of(data.scores[name]);
    for (let i = 0; i < values.length; i++) {
      values[i] = Number.isNaN(values[i]) ? 0 : (values[i] - low) / (high - low || 1);
    }
    return { values, palette: ramp(), continuous: true };
  }

  async function look() {
    for (const map of maps) {
      const axis = (name) => ({ ...byName[name],
        values: map.scores[name] || Float32Array.from(map.rows, (row) => data.scores[name][row]) });
      await map.draw(axis($("x").value), axis($("y").value), colours(map));
    }
    legend();
    refresh();
  }

  function legend() {
    const name = $("colour").value;
    const dot = (colour, text) => {
      const mark = el("span", {}, "\u25cf ");
      mark.style.color = colour;
      return el("span", {}, mark, text + " ");
    };
    const parts = { class: header.classes, region: header.regions }[name];
    if (parts && parts.length > KINDS_OF.length) $("legend").replaceChildren("colours repeat");
    else if (parts) {
      const palette = name === "class" ? KINDS_OF : REGION_COLOURS;
      $("legend").replaceChildren(...parts.map((part, k) => dot(palette[k], part)));
    } else {
      const { low, high } = byName[name];
      $("legend").replaceChildren(`${short(low)} `,
        ...ramp().map((colour) => dot(colour, "")), ` ${short(high)}`);
    }
  }

  // Filters
  function filter(bit, hides) {
    for (let i = 0; i < n; i++) mask[i] = hides && hides(i) ? mask[i] | bit : mask[i] & ~bit;
    shown();
  }

  function shown() {
    let passing = 0;
    for (let i = 0; i < n; i++) passing += mask[i] === 0;
    $("passing").textContent = passing === n ? `All ${count(n)} images are shown.`
      : `${count(passing)} of ${count(n)} images pass the filters.`;
    for (const map of maps) {
      const total = map.rows ? map.rows.length : n;
      const kept = [];
      const hidden = new Uint8Array(total);
      for (let k = 0; k < total; k++) {
        if (mask[map.rows ? map.rows[k] : k] === 0) kept.push(k);
        else hidden[k] = 1;
      }
      map.show(passing === n ? null : kept, passing === n ? null : hidden);
    }
    select(selected, "keep");
  }

  function toggles(parent, parts, bit, of) {
    const boxes = parts.map((part, k) => {
      const box = el("input", { type: "checkbox", value: String(k) });
      box.checked = true;
      parent.append(el("label", {}, box, " " + part));
      return box;
    });
    parent.addEventListener("change", () => {
      const on_ = new Set(boxes.filter((box) => box.checked).map((box) => +box.value));
      filter(bit, on_.size === parts.length ? null : (i) => !on_.has(of[i]));
    });
    const all = el("button", { type: "button" }, "none");
    all.addEventListener("click", () => {
      const none = boxes.some((box) => box.checked);
      boxes.forEach((box) => (box.checked = !none));
      all.textContent = none ? "all" : "none";
      parent.dispatchEvent(new Event("change"));
    });
    parent.append(all);
    return () => boxes.forEach((box) => (box.checked = true));
  }

  const resets = [toggles($("classes"), header.classes, 1, data.labels),
    toggles($("region-filter"), header.regions, 2, data.region)];

  function addHistogram(name) {
    if (histograms.has(name)) return;
    const bit = 4 << histograms.size;
    const values = data.scores[name];
    const made = new Histogram($("histograms"), byName[name], values, (low, high) =>
      filter(bit, low === undefined ? null : (i) => !(values[i] >= low && values[i] <= high)));
    histograms.set(name, [made, bit]);
    made.update(mask, bit, chosen);
    for (const option of $("more").options) option.disabled = histograms.has(option.value);
  }

  // Selection
  function select(found, how) {
    const kept = how === "add" || how === "remove" ? new Set(selected) : new Set();
    for (const row of found) {
      if (mask[row] !== 0) continue;
      if (how === "remove") kept.delete(row);
      else kept.add(row);
    }
    selected = Uint32Array.from(kept).sort();
    chosen.fill(0);
    for (const row of selected) chosen[row] = 1;
    pageNumber = 0;
    refresh();
  }

  function refresh() {
    const none = selected.length === 0;
    $("selected").textContent = none ? "Nothing is selected."
      : `${count(selected.length)} of ${count(n)} images are selected.`;
    $("download").disabled = $("clear").disabled = none;
    for (const map of maps) {
      map.select(map.rows ? Array.from(selected, map.position).filter((k) => k >= 0) : selected);
    }
    for (const [made, bit] of histograms.values()) made.update(mask, bit, chosen);
    $("counts").replaceChildren(...countsTable(data, chosen, selected.length));
    gallery();
  }

  function gallery() {
    const score = data.scores[$("sort").value];
    const sign = $("descending").checked ? -1 : 1;
    const order = Array.from(selected).sort((a, b) => sign * (score[a] - score[b]) || a - b);
    const pages = Math.max(1, Math.ceil(order.length / PAGE));
    pageNumber = Math.min(Math.max(pageNumber, 0), pages - 1);
    $("page-number").textContent = order.length ? `page ${pageNumber + 1} of ${pages}` : "";
    $("pager").hidden = !order.length;
    $("back").disabled = pageNumber === 0;
    $("forth").disabled = pageNumber === pages - 1;
    const rows = order.slice(pageNumber * PAGE, (pageNumber + 1) * PAGE);
    $("gallery").replaceChildren(...rows.map((row) => image(row, $("sort").value)));
  }

  function find() {
    if (!at.size) for (let i = 0; i < n; i++) at.set(data.ids[i], i);
    const row = at.get(Number($("id").value.trim() || NaN));
    if (row === undefined) $("selected").textContent = `There is no image ${$("id").value} here.`;
    else if (mask[row]) $("selected").textContent = "The filters hide this image.";
    else (select([row], "replace"), inspect(row));
  }

  function download() {
    if (!$("name").checkValidity() || !$("name").value) {
      $("selected").textContent = "A name has letters, digits, _ and -, a letter or digit first.";
      return;
    }
    const name = $("name").value;
    const content = { ...header.selection, name, example_ids: Array.from(selected, (row) => data.ids[row]) };
    const file = new Blob([JSON.stringify(content)], { type: "application/json" });
    const link = el("a", { href: URL.createObjectURL(file), download: `${header.name}-${name}.json` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  // Controls
  const menu = (id, options, value) => {
    $(id).append(...options.map((name) => el("option", { value: name }, name)));
    if (value) $(id).value = value;
  };
  menu("x", names, "variability");
  menu("y", names, "confidence");
  menu("colour", [...names, "class", "region"], "correctness");
  menu("sort", names, "confidence");
  menu("more", ["", ...names]);
  for (const id of ["x", "y", "colour"]) $(id).addEventListener("change", look);
  for (const id of ["sort", "descending"]) $(id).addEventListener("change", gallery);
  $("more").addEventListener("change", () => {
    if ($("more").value) addHistogram($("more").value);
    $("more").value = "";
  });
  const mode = (moves) => {
    maps.forEach((map) => map.moving(moves));
    $("lasso").setAttribute("aria-pressed", String(!moves));
    $("move").setAttribute("aria-pressed", String(moves));
  };
  const click = (id, action) => $(id).addEventListener("click", action);
  click("lasso", () => mode(false));
  click("move", () => mode(true));
  click("whole", () => maps.forEach((map) => map.whole()));
  click("clear", () => select([], "replace"));
  click("find", find);
  click("download", download);
  click("back", () => (pageNumber--, gallery()));
  click("forth", () => (pageNumber++, gallery()));
  click("select-passing", () => select(Array.from(mask.keys()).filter((i) => mask[i] === 0), "replace"));
  click("unfilter", () => {
    resets.forEach((reset) => reset());
    for (const [made] of histograms.values()) made.mark();
    mask.fill(0);
    shown();
  });
  $("id").addEventListener("keydown", (event) => event.key === "Enter" && find());
  document.addEventListener("keydown", (event) => event.key === "Escape" && select([], "replace"));
  $("how-to-read").textContent = "The file holds the ids and the fingerprint of their data set. " +
    `python -m kdlib pick params/${header.name}.yaml FILE makes it the strategy picked_NAME of the study.`;
  dark.addEventListener("change", () => {
    maps.forEach((map) => map.theme());
    look();
  });

  const first = ["confidence", "variability", "correctness", "forgetting_events", "el2n", "aum"];
  first.filter((name) => byName[name]).forEach(addHistogram);
  $("passing").textContent = `All ${count(n)} images are shown.`;
  return look();
}

readData()
  .then(start)
  .then(() => document.body.setAttribute("data-ready", "yes"))
  .catch((error) => {
    $("failure").hidden = false;
    $("failure").textContent = `This page could not be shown: ${error.message}`;
    console.error(error);
  });
