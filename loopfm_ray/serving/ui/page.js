// The page of the scoring service: asks the service that gave it, and keeps a key in memory alone.
"use strict";

const TOP = 10;
const find = (id) => document.getElementById(id);
const base = new URL(".", document.baseURI);
let key = "";
let described = null;
let samples = null;

class Problem extends Error {
  constructor(status, body) {
    super(body.detail || `the service answered ${status}`);
    this.status = status;
    this.errors = body.errors || [];
  }
}

async function call(path, body) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const options = { headers, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["content-type"] = "application/json";
  }
  const answer = await fetch(new URL(path, base), options);
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Problem(answer.status, found);
  return found;
}

function show(problem) {
  const box = find("problem");
  box.hidden = problem === null;
  box.replaceChildren();
  if (problem === null) return;
  box.append(element("p", problem.message));
  if (problem.errors && problem.errors.length) {
    const list = element("ul");
    for (const one of problem.errors) list.append(element("li", `${one.field}: ${one.message}`));
    box.append(list);
  }
}

/** Do some work; a key that is asked for opens the form for it, everything else is shown. */
async function attempt(text, work) {
  find("status").textContent = text;
  find("score").disabled = true;
  show(null);
  try {
    await work();
  } catch (error) {
    if (error.status === 401) {
      find("key-form").hidden = false;
      if (key) show(error);
      find("key").focus();
    } else {
      show(error);
    }
  } finally {
    find("status").textContent = "";
    find("score").disabled = false;
  }
}

async function loadModels() {
  const summary = await call("v1/models");
  const select = find("model");
  select.replaceChildren();
  for (const model of summary.models) {
    const option = element("option", model.name);
    option.value = model.name;
    select.append(option);
  }
  find("key-form").hidden = true;
  find("ask").hidden = false;
  if (summary.models.length) await loadModel();
}

async function loadModel() {
  const name = encodeURIComponent(find("model").value);
  find("result").hidden = true;
  [described, samples] = await Promise.all([call(`v1/models/${name}`), call(`v1/models/${name}/samples`)]);
  fillUsers();
  fillMoments();
  find("items").value = samples.items.join("\n");
  fillContext();
}

function fillUsers() {
  const box = find("users");
  box.replaceChildren();
  for (const one of samples.users) {
    const button = element("button", one.user);
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.append(element("span", ` ${one.history_len}`));
    button.addEventListener("click", () => {
      find("user").value = one.user;
      markUser();
      score();
    });
    box.append(button);
  }
  find("known").hidden = samples.users.length === 0;
  if (samples.users.length) find("user").value = samples.users[0].user;
  markUser();
}

function markUser() {
  const buttons = [...find("users").children];
  buttons.forEach((button, place) => {
    button.setAttribute("aria-pressed", String(samples.users[place].user === find("user").value));
  });
}

/** Offer now, and the moment until which events are published: an old log has no history that is fresh now. */
function fillMoments() {
  const watermark = described.variants.stable.features.watermark_ts;
  const choices = [["now", "Now"], ["other", "Another moment"]];
  if (watermark !== null) choices.splice(1, 0, ["watermark", `Last published, ${moment(watermark).slice(0, 10)}`]);
  find("when").replaceChildren();
  for (const [value, text] of choices) {
    const option = element("option", text);
    option.value = value;
    find("when").append(option);
  }
  const isOld = watermark !== null && Date.now() * 1000 - watermark > 86400e6;
  find("when").value = isOld ? "watermark" : "now";
  find("moment-field").hidden = true;
}

function fillContext() {
  const box = find("context");
  box.replaceChildren();
  const fields = described.variants.stable.fields.filter(
    (field) => field.source === "request" && ["context", "past"].includes(field.side),
  );
  for (const field of fields) {
    const label = element("label", `${field.name} (${field.kind})`);
    const input = element("input");
    input.name = field.name;
    input.dataset.kind = field.kind;
    input.autocomplete = "off";
    input.spellcheck = false;
    if (field.kind === "numeric") input.inputMode = "decimal";
    input.placeholder = field.kind === "sequence" ? "keys with commas between" : `left out: ${field.default}`;
    if (field.name in samples.context) input.value = samples.context[field.name];
    label.append(input);
    box.append(label);
  }
  const hasPast = Object.keys(samples.context).length > 0;
  find("context-note").textContent = hasPast
    ? "Fields of the user's past have no default. What stands here is for a user who never met these items."
    : "A field left empty takes its default.";
}

function readContext() {
  const context = {};
  for (const input of find("context").querySelectorAll("input")) {
    const text = input.value.trim();
    if (text === "") continue;
    const kind = input.dataset.kind;
    if (kind === "numeric") {
      const number = Number(text);
      if (!Number.isFinite(number)) throw new Error(`${input.name} takes a number, found ${text}`);
      context[input.name] = number;
    } else {
      context[input.name] = kind === "sequence" ? text.split(",").map((one) => one.trim()) : text;
    }
  }
  return context;
}

function readRequest() {
  const items = find("items").value.split("\n").map((one) => one.trim()).filter((one) => one !== "");
  const request = { user: find("user").value, items, context: readContext() };
  if (find("when").value === "watermark") request.request_ts = described.variants.stable.features.watermark_ts;
  if (find("when").value === "other") request.request_ts = find("moment").value.trim();
  return request;
}

function score() {
  return attempt("Scoring…", async () => {
    find("result").hidden = true;
    const request = readRequest();
    const name = encodeURIComponent(find("model").value);
    const found = await call(`v1/models/${name}:explore`, request);
    showCandidates(request.items, found);
    showHistory(found);
    showDefaults(found.with_history, request.items.length);
    showVersions(found);
    find("result").hidden = false;
  });
}

function showCandidates(items, found) {
  const plain = found.without_history ? found.without_history.scores : null;
  const rows = items.map((item, place) => ({ item, score: found.with_history.scores[place], plain: plain && plain[place] }));
  rows.sort((one, other) => other.score - one.score);
  const top = rows.slice(0, TOP);
  const largest = Math.max(...top.map((row) => Math.max(row.score, row.plain ?? 0)), 1e-12);
  const head = element("tr");
  const names = plain ? ["#", "Item", "With history", "Without", "Change", ""] : ["#", "Item", "Score", ""];
  names.forEach((name, place) => {
    const cell = element("th", name, place === names.length - 1 ? "bars-column" : "");
    cell.scope = "col";
    head.append(cell);
  });
  const body = element("tbody");
  top.forEach((row, place) => body.append(candidate(row, place + 1, largest)));
  const table = find("candidates");
  const headRows = element("thead");
  headRows.append(head);
  table.replaceChildren(headRows, body);
  const note = find("candidates-note");
  note.textContent = plain
    ? `The best ${top.length} of ${items.length} candidates by the score with history.`
    : `The best ${top.length} of ${items.length} candidates. This model reads no history.`;
  if (plain) note.append(element("span", " The gray bar is the score without.", "bars-column"));
}

function candidate(row, rank, largest) {
  const line = element("tr");
  const item = element("th", row.item);
  item.scope = "row";
  line.append(element("td", String(rank)), item);
  const cell = element("td", row.score.toFixed(4));
  cell.dataset.score = String(row.score);
  line.append(cell);
  if (row.plain !== null) {
    const change = row.score - row.plain;
    const plain = element("td", row.plain.toFixed(4));
    plain.dataset.score = String(row.plain);
    const sign = change >= 0 ? "+" : "−";
    line.append(plain, element("td", `${sign}${Math.abs(change).toFixed(4)}`, change >= 0 ? "up" : "down"));
  }
  const picture = element("td", undefined, "bars-column");
  picture.append(bars(row.score, row.plain, largest));
  line.append(picture);
  return line;
}

function showHistory(found) {
  const features = found.with_history.features, ages = found.events_age_s;
  facts(find("history"), [
    ["Events read", String(features.history_len)],
    ["Newest event", features.age_s === null ? "none" : `${duration(features.age_s)} before the request`],
    ["Complete", features.degraded ? `no: ${features.reason}` : "yes", features.degraded],
  ]);
  find("timeline").replaceChildren();
  find("ages").replaceChildren();
  find("ages-all").hidden = ages.length === 0;
  if (ages.length) find("timeline").append(timeline(ages));
  for (const age of ages) find("ages").append(element("li", duration(age)));
}

function showDefaults(answer, numItems) {
  const features = answer.features, none = (names) => (names.length ? names.join(", ") : "none");
  facts(find("defaults"), [
    ["User", features.unknown_user ? "not known" : "known", features.unknown_user],
    ["Unknown candidates", `${answer.unknown_items} of ${numItems}`, answer.unknown_items > 0],
    ["Fields of unknown value", none(features.unknown_fields), features.unknown_fields.length > 0],
    ["Fields by default", none(features.default_fields)],
  ]);
}

function showVersions(found) {
  const answer = found.with_history, variant = described.variants[answer.model.variant];
  const entries = [
    ["Model", `${answer.model.name}, ${answer.model.variant}`],
    ["Bundle", answer.model.version],
    ["Request", moment(found.request_ts)],
  ];
  if (answer.features.version !== null) {
    entries.push(["Latents", answer.features.version], ["Trained on", variant ? variant.features.trained_on : "unknown"]);
    entries.push(["FM snapshot", answer.features.snapshot_id]);
  }
  if (found.watermark_ts !== null) {
    const lag = (found.request_ts - found.watermark_ts) / 1e6;
    const place = lag >= 0 ? `${duration(lag)} before the request` : `${duration(-lag)} after the request`;
    entries.push(["Published until", `${moment(found.watermark_ts)}, ${place}`]);
  }
  facts(find("versions"), entries);
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("key").value.trim();
  find("key").value = "";
  attempt("Loading…", loadModels);
});
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  score();
});
find("model").addEventListener("change", () => attempt("Loading…", loadModel));
find("user").addEventListener("input", markUser);
find("when").addEventListener("change", () => {
  find("moment-field").hidden = find("when").value !== "other";
});
attempt("Loading…", loadModels);
