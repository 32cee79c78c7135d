// What jupyter-scatter 1.0.1 lacks, for the map in the same `.kdlib-map`: it draws the last points
// that came while others were drawn, fits the map to its canvas and to the window, tells the kernel
// a dark theme, lets a button or a key say whether a lasso adds or removes, and passes on the keys
// of undo and redo, and clicks on images.

const AXIS = 32; // pixels of the numbers and the label of x, which are below the height of a map

function dark(el) { // of the first colour behind the map that is not transparent
  for (let node = el; node; node = node.parentElement) {
    const [r, g, b, a = 1] = getComputedStyle(node).backgroundColor.match(/[\d.]+/g).map(Number);
    if (a > 0.5) return 0.299 * r + 0.587 * g + 0.114 * b < 128;
  }
  return false;
}

// jupyter-scatter drops points that come while it draws others. Here they wait, and the last ones
// are drawn.
function keepLast(plot) {
  const draw = plot.draw;
  let next; // arguments of the last call that is not drawn yet
  let running;
  async function run() {
    try {
      while (next && !plot.get("isDestroyed")) {
        if (plot.get("isDrawing")) {
          await new Promise(requestAnimationFrame);
          continue;
        }
        const call = next;
        next = undefined;
        await draw(...call);
      }
    } finally {
      running = undefined;
    }
  }
  plot.draw = (...call) => {
    next = call;
    return (running ??= run());
  };
}

export default {
  render({ model, el }) {
    const ends = []; // what takes back what was attached
    let ended = false;
    const listen = (target, event, call, options) => {
      target.addEventListener(event, call, options);
      ends.push(() => target.removeEventListener(event, call, options));
    };
    const watch = (Observer, call, target, options) => {
      const observer = new Observer(call);
      observer.observe(target, options);
      ends.push(() => observer.disconnect());
    };

    function start() {
      const box = el.closest(".kdlib-map");
      const map = [...(box?.querySelectorAll("div") ?? [])].find((div) => div.api);
      if (!map) {
        if (!ended) requestAnimationFrame(start); // the map is not there yet
        return;
      }
      const app = el.closest(".kdlib-app");
      const [plot, canvas] = [map.api, map.querySelector("canvas")];
      keepLast(plot);
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", model.get("label"));

      // jupyter-scatter draws the ranges of both axes as a square as high as the canvas; a canvas
      // narrower than high cuts off both ends of x. This narrows the square to the canvas. Setting
      // the view again redraws the axes.
      plot.set({ height: "auto" }); // else it stays as high as it is at first
      async function fit() {
        if (ended || !canvas.clientWidth || !canvas.clientHeight) return;
        const width = Math.max(1, canvas.clientWidth - 16); // room for the labels of both ends
        await plot.set({ aspectRatio: Math.min(1, width / canvas.clientHeight) });
        plot.view(plot.get("cameraView"));
      }
      watch(ResizeObserver, () => requestAnimationFrame(fit), canvas);

      // The map ends where the window does when the app's first line stands at its top.
      function grow() {
        const above = box.getBoundingClientRect().top - app.getBoundingClientRect().top;
        const notebook = app.closest(".jp-WindowedPanel-outer, .jp-NotebookPanel-notebook");
        const room = Math.floor((notebook?.clientHeight ?? innerHeight) - above - AXIS - 12);
        const height = Math.max(320, Math.min(model.get("most"), room));
        app.style.setProperty("--kdlib-height", `${height}px`);
        if (height === model.get("height")) return;
        model.set("height", height);
        model.save_changes();
      }
      listen(window, "resize", grow);
      watch(ResizeObserver, () => requestAnimationFrame(grow), app);

      function theme() {
        model.set("dark", dark(box.parentElement));
        model.save_changes();
      }
      watch(MutationObserver, () => requestAnimationFrame(theme), document.body, {
        attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"],
      });
      theme();

      // The map reads Shift and Alt when a lasso or a click ends; a button stands for these keys.
      function operation(event) {
        const mode = model.get("operation");
        const how = event.shiftKey ? "add" : event.altKey ? "remove" : mode;
        Object.defineProperty(event, "shiftKey", { value: how === "add" });
        Object.defineProperty(event, "altKey", { value: how === "remove" });
        model.send({ operation: how });
      }
      let drawing = false; // a lasso can end outside of the canvas
      let [pressed, moved] = [null, false];
      listen(window, "mousedown", (event) => {
        [drawing, pressed, moved] = [event.target === canvas, event, false];
      }, true);
      listen(window, "mousemove", (event) => {
        if (drawing && event.buttons) moved ||= Math.hypot(
          event.clientX - pressed.clientX, event.clientY - pressed.clientY) > 10; // pixels
      }, true);
      listen(window, "mouseup", (event) => {
        if (drawing) operation(event);
      }, true);
      listen(window, "click", (event) => {
        if (event.target !== canvas) return;
        // jupyter-scatter takes a lasso that ends where it began for a click on a point as well.
        if (moved) event.stopPropagation();
        else operation(event);
      }, true);

      // JupyterLab would take a letter or Enter on a button for a command on the cell.
      if (model.get("listens")) listen(app, "keydown", (event) => {
        const command = event.ctrlKey || event.metaKey || event.altKey || event.key === "Escape" ||
          (event.shiftKey && event.key === "Enter");
        if (!command) event.stopPropagation();
      });

      if (model.get("listens")) listen(document, "keydown", (event) => {
        const here = app.contains(document.activeElement) || app.matches(":hover");
        const typing = document.activeElement?.matches("input, textarea, .cm-content");
        if (!here || typing) return;
        if (!(event.ctrlKey || event.metaKey) || event.altKey) return;
        const key = event.key.toLowerCase();
        if (key !== "z" && key !== "y") return;
        event.preventDefault();
        event.stopPropagation(); // JupyterLab would take back a change of the cell
        model.send({ key: key === "y" || event.shiftKey ? "redo" : "undo" });
      }, true);
    }
    // A click or Enter on an image of the app asks for its panel.
    function ask(event) {
      const image = event.target.closest?.(".kdlib-app [data-example]");
      if (!image || !el.closest(".kdlib-app")?.contains(image)) return;
      if (event.type === "keydown" && event.key !== "Enter") return;
      event.preventDefault();
      event.stopPropagation(); // JupyterLab would edit the cell
      model.send({ example: Number(image.dataset.example) });
    }
    if (model.get("listens")) {
      listen(document, "click", ask, true);
      listen(document, "keydown", ask, true);
    }

    start();
    return () => {
      ended = true;
      ends.forEach((end) => end());
    };
  },
};
