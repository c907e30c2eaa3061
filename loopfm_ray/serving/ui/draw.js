// Small drawings and texts. Everything that came from the service is set as text, never as markup.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Say a duration in its largest fitting unit. */
function duration(seconds) {
  const units = [["y", 365 * 86400], ["d", 86400], ["h", 3600], ["min", 60]];
  for (const [unit, size] of units) {
    if (Math.abs(seconds) >= size) return `${(seconds / size).toFixed(1)} ${unit}`;
  }
  return `${seconds.toFixed(1)} s`;
}

function moment(micros) {
  return new Date(micros / 1000).toISOString().replace(/\.\d+Z$/, "Z");
}

/** Draw when the events were, the newest at the right; close events look darker. */
function timeline(ages) {
  const width = 420, height = 54, left = 6, right = width - 6, y = 22;
  const oldest = Math.max(...ages, 1);
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  picture.append(shape("title", {}, `${ages.length} events, from ${duration(oldest)} ago to ${duration(Math.min(...ages))} ago`));
  picture.append(shape("line", { x1: left, x2: right, y1: y, y2: y, class: "axis" }));
  for (const age of ages) {
    picture.append(shape("circle", { cx: right - (age / oldest) * (right - left), cy: y, r: 5, class: "event" }));
  }
  picture.append(shape("text", { x: left, y: height - 6 }, `${duration(oldest)} ago`));
  picture.append(shape("text", { x: right, y: height - 6, "text-anchor": "end" }, "the request"));
  return picture;
}

/** Draw the two scores of an item above each other, on the scale of the largest. */
function bars(score, plain, largest) {
  const width = 110, share = (value) => Math.max(1, (value / largest) * width);
  const picture = shape("svg", { viewBox: `0 0 ${width} 16`, "aria-hidden": "true" });
  picture.append(shape("rect", { x: 0, y: 0, width: share(score), height: 7, rx: 2, class: "bar" }));
  if (plain !== null) {
    picture.append(shape("rect", { x: 0, y: 9, width: share(plain), height: 7, rx: 2, class: "bar-plain" }));
  }
  return picture;
}

/** Fill a list of facts; a fact that is a warning stands out. */
function facts(list, entries) {
  list.replaceChildren();
  for (const [name, text, isFlag] of entries) {
    list.append(element("dt", name), element("dd", text, isFlag ? "flag" : ""));
  }
}
