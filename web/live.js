// Draws on a guidance node the loss over the steps, while it samples.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { unsaved } from "./unsaved.js";

const NAME = "loss curve";
const HEIGHT = 60;
const MARGIN = 15; // as ComfyUI's own widgets have it
const PAD = 6;
const LINE = "#3b8fd9"; // legible on dark and on light

function lossCurve() {
  return {
    name: NAME,
    type: "sphereguide.loss_curve",
    computeSize: (width) => [width, HEIGHT],
    steps: 0,
    losses: new Map(), // step → one loss a sample, null where it is not finite
    draw(ctx, node, width, y) {
      ctx.save();
      ctx.fillStyle = LiteGraph.WIDGET_BGCOLOR;
      ctx.strokeStyle = LiteGraph.WIDGET_OUTLINE_COLOR;
      ctx.lineWidth = 1;
      ctx.beginPath();
      ctx.rect(MARGIN, y, width - 2 * MARGIN, HEIGHT);
      ctx.fill();
      ctx.stroke();
      drawLosses(ctx, this, MARGIN + PAD, y + PAD, width - 2 * (MARGIN + PAD), HEIGHT - 2 * PAD);
      ctx.restore();
    },
  };
}

function drawLosses(ctx, { steps, losses }, left, top, width, height) {
  const points = [...losses].map(([step, values]) => [step, values, mean(values)]);
  const finite = points.flatMap(([, values]) => values).filter((value) => value !== null);
  const last = points.at(-1);
  ctx.font = "11px sans-serif";
  ctx.textBaseline = "top";
  ctx.fillStyle = LiteGraph.WIDGET_SECONDARY_TEXT_COLOR;
  ctx.textAlign = "left";
  ctx.fillText(last ? "loss" : "loss, while it samples", left, top);
  if (!last) return;
  ctx.textAlign = "right";
  ctx.fillText(`step ${last[0] + 1} of ${steps}`, left + width, top);
  ctx.textAlign = "left";
  ctx.fillStyle = LiteGraph.WIDGET_TEXT_COLOR;
  ctx.fillText(last[2] === null ? "not finite" : String(Number(last[2].toPrecision(3))), left + 28, top);

  const [low, high] = [Math.min(...finite), Math.max(...finite)];
  const place = ([step, value]) => [
    left + (width * step) / Math.max(steps - 1, 1),
    top + height - (height - 16) * (high > low ? (value - low) / (high - low) : 0.5),
  ];
  ctx.strokeStyle = ctx.fillStyle = LINE;
  if (last[1].length > 1) {
    ctx.globalAlpha *= 0.35;
    for (const sample of last[1].keys()) drawLine(ctx, points.map(([step, values]) => [step, values[sample]]), place);
    ctx.globalAlpha /= 0.35;
  }
  ctx.lineWidth = 1.5;
  drawLine(ctx, points.map(([step, , value]) => [step, value]), place);
}

/** A line through the points that have a value, and a dot on the last of them. */
function drawLine(ctx, points, place) {
  const path = points.filter(([, value]) => value !== null).map(place);
  ctx.beginPath();
  for (const [x, y] of path) ctx.lineTo(x, y);
  ctx.stroke();
  if (!path.length) return;
  ctx.beginPath();
  ctx.arc(...path.at(-1), 2, 0, 2 * Math.PI);
  ctx.fill();
}

function mean(values) {
  const finite = values.filter((value) => value !== null);
  return finite.length ? finite.reduce((sum, value) => sum + value, 0) / finite.length : null;
}

const root = () => app.rootGraph ?? app.graph;

/** The node of an id such as "7", or "12:7" in a subgraph. */
function nodeOf(id) {
  let graph = root();
  let node;
  for (const part of id.split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

app.registerExtension({
  name: "SphereGuide.Live",
  setup() {
    let running; // the id of the workflow, where pages have several open
    api.addEventListener("sphereguide.trace", ({ detail: { node, steps, step, loss, workflow } }) => {
      if (!loss) running = workflow;
      if (running && running !== root().id) return; // another one is open by now
      const widget = nodeOf(node)?.widgets?.find(({ name }) => name === NAME);
      if (!widget) return;
      widget.steps = steps;
      if (loss) widget.losses.set(step, loss);
      else widget.losses.clear(); // a run begins
      app.canvas.setDirty(true);
      widget.triggerDraw?.(); // Nodes 2.0, where a widget has a canvas of its own
    });
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("SphereGuide")) return;
    if (!node.outputs?.some(({ type }) => type === "GUIDANCE_TRACE")) return;
    unsaved(node, node.addCustomWidget(lossCurve()));
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  },
});
