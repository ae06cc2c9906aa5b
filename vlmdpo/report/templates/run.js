"use strict";
// Draws every chart of the page's data as SVG: raw values faint, smoothed ones strong, a cursor that tells values.
const charts = JSON.parse(document.getElementById("data").textContent);
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [460, 230, 52, 10, 8, 24];
const slider = document.getElementById("smoothing");
const svg = (name, attributes, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};
const html = (name, attributes, text) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};
const shown = (value) => value === 0 ? "0" : Math.abs(value) < 0.001 || Math.abs(value) >= 1e5 ? value.toExponential(1) : String(+value.toPrecision(4));

// An exponential moving average, corrected for its start as Adam's moments are.
function smooth(points, weight) {
  let mean = 0;
  return points.map(([step, value], i) => {
    mean = weight * mean + (1 - weight) * value;
    return [step, mean / (1 - weight ** (i + 1))];
  });
}

function ticks(low, high) {
  // The widest step of 1, 2 or 5 times a power of ten that puts three labels or more between the ends.
  const unit = 10 ** Math.floor(Math.log10(high - low));
  const count = (step) => Math.floor(high / step + 1e-9) - Math.ceil(low / step - 1e-9) + 1;
  const step = [1, 0.5, 0.2, 0.1, 0.05].map((by) => by * unit).find((one) => count(one) >= 3);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

function draw(chart, box) {
  const weight = chart.exact ? 0 : Number(slider.value);
  const curves = chart.curves.filter((curve) => !curve.hidden);
  const values = curves.flatMap((curve) => curve.points.map((point) => point[1]));
  const steps = chart.curves.flatMap((curve) => curve.points.map((point) => point[0]));
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (chart.level && values.length) [low, high] = [Math.min(low, chart.level[0]), Math.max(high, chart.level[0])];
  if (!values.length || low === high) [low, high] = [(low || 0) - 0.5, (high || 0) + 0.5];
  const room = (high - low) * 0.05;
  [low, high] = [low - room, high + room];
  const [first, last] = [Math.min(...steps), Math.max(Math.max(...steps), Math.min(...steps) + 1)];
  const x = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first);
  const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low);
  const line = (points) => points.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const picture = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": chart.title});
  for (const at of ticks(low, high)) {
    picture.append(svg("line", {x1: LEFT, x2: WIDTH - RIGHT, y1: y(at), y2: y(at), stroke: "var(--line)"}));
    picture.append(svg("text", {x: LEFT - 6, y: y(at) + 4, "text-anchor": "end"}, shown(at)));
  }
  for (const at of ticks(first, last).filter(Number.isInteger)) picture.append(svg("text", {x: x(at), y: HEIGHT - 6, "text-anchor": "middle"}, at));
  if (chart.level) {
    const at = y(chart.level[0]), above = at > TOP + 24;
    picture.append(svg("line", {x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at, stroke: "var(--soft)", "stroke-dasharray": "5 4"}));
    picture.append(svg("text", {x: WIDTH - RIGHT, y: above ? at - 4 : at + 13, "text-anchor": "end"}, chart.level[1]));
  }
  for (const curve of curves) {
    const common = {class: `curve ${curve.colour}`, fill: "none"};
    if (curve.dotted) picture.append(svg("path", {...common, d: line(curve.points), "stroke-width": 1.5, "stroke-dasharray": "2 4"}));
    else {
      if (weight) picture.append(svg("path", {...common, d: line(curve.points), "stroke-width": 1, opacity: 0.3}));
      picture.append(svg("path", {...common, d: line(smooth(curve.points, weight)), "stroke-width": 2}));
    }
    if (curve.dotted || curve.points.length === 1)
      for (const [step, value] of curve.points) picture.append(svg("circle", {class: `point ${curve.colour}`, cx: x(step), cy: y(value), r: 3}));
  }
  const cursor = svg("line", {y1: TOP, y2: HEIGHT - BOTTOM, stroke: "var(--soft)", visibility: "hidden"});
  picture.append(cursor);
  picture.addEventListener("pointermove", (event) => {
    const at = picture.getBoundingClientRect();
    const step = first + ((event.clientX - at.left) * WIDTH / at.width - LEFT) / (WIDTH - LEFT - RIGHT) * (last - first);
    const near = steps.reduce((best, one) => Math.abs(one - step) < Math.abs(best - step) ? one : best, steps[0]);
    cursor.setAttribute("x1", x(near));
    cursor.setAttribute("x2", x(near));
    cursor.setAttribute("visibility", "visible");
    legend(chart, box, near);
  });
  picture.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); legend(chart, box); });
  box.querySelector("svg")?.remove();
  box.append(picture);
  legend(chart, box);
}

function legend(chart, box, step) {
  const names = box.querySelector(".legend");
  names.replaceChildren();
  for (const curve of chart.curves) {
    const at = step === undefined ? undefined : curve.points.find((point) => point[0] === step);
    const title = curve.hidden ? "show this curve" : "hide this curve";
    const button = html("button", {type: "button", "aria-pressed": String(!curve.hidden), title});
    button.append(html("span", {class: `swatch ${curve.colour} ${curve.dotted ? "dotted" : "solid"}`}), curve.label + (at ? ` ${shown(at[1])}` : ""));
    button.addEventListener("click", () => { curve.hidden = !curve.hidden; draw(chart, box); });
    names.append(button);
  }
  if (step !== undefined) names.append(html("span", {class: "soft"}, `step ${step}`));
}

const boxes = charts.map((chart) => {
  const box = html("div", {class: "chart"});
  box.append(html("h3", {}, chart.title), html("div", {class: "legend"}));
  document.getElementById("charts").append(box);
  return box;
});
const drawAll = () => {
  document.getElementById("smoothed").textContent = Number(slider.value).toFixed(2);
  charts.forEach((chart, i) => draw(chart, boxes[i]));
};
slider.addEventListener("input", drawAll);
drawAll();
