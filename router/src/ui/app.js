// The page at /ui. Reads /debug/state once a second; keeps a minute of it to tell rates; draws by hand.
"use strict";

const POLL_MS = 1000;
const PATIENCE_MS = 5000;
// Rates are taken over these many seconds, times over the longer span.
const RATE_S = 5;
const SPAN_S = 60;
const DENSE_FROM = 7;

const history = [];
// The last minute of each figure.
const series = new Map();
let lastContact = null;
let measure = "backlog";
let picked = null;

const byId = (id) => document.getElementById(id);

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function drawn(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// 1234567 → "1.23 M"; with three significant digits, as people compare them.
function scaled(value, units, gap) {
  let unit = 0;
  while (Math.abs(value) >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  const digits = unit === 0 && Number.isInteger(value) ? 0 : value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  return value.toFixed(digits) + (units[unit] ? gap + units[unit] : "");
}

const bytes = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB", "PB"], " ");
const shortBytes = (value) => scaled(value, ["", "k", "M", "G", "T", "P"], "");
const count = (value) => scaled(value, ["", "k", "M", "G"], " ");
const rate = (value) => (value === 0 ? "0" : value < 9.95 ? value.toFixed(1) : scaled(Math.round(value), ["", "k", "M"], " "));

function time(seconds) {
  if (seconds < 0.9995) return `${seconds < 0.00995 ? (seconds * 1000).toFixed(1) : Math.round(seconds * 1000)} ms`;
  return seconds < 99.5 ? `${seconds.toPrecision(3)} s` : `${Math.round(seconds)} s`;
}

function age(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"]];
  const found = units.find(([size]) => seconds >= 2 * size);
  return found ? `${Math.floor(seconds / found[0])} ${found[1]}` : `${Math.floor(seconds)} s`;
}

// The newest state that is at least so old, or the oldest one.
function before(seconds) {
  const now = history[history.length - 1];
  for (let at = history.length - 2; at >= 0; at -= 1) {
    if (now.uptime_s - history[at].uptime_s >= seconds - 0.5) return history[at];
  }
  return history[0];
}

// How fast `pick` grows, per second. Workers that were not there before have no rate yet.
function growth(pick) {
  const now = history[history.length - 1];
  const then = before(RATE_S);
  const span = now.uptime_s - then.uptime_s;
  const [is, was] = [pick(now), pick(then)];
  if (span <= 0 || is === undefined || was === undefined) return 0;
  return Math.max(0, is - was) / span;
}

const named = (workers, name) => workers.find((worker) => worker.name === name);

// A pair by its names: between two states its place in the matrix may have changed.
function pairRequests(prefill, decode) {
  return (state) => {
    const p = state.prefills.findIndex((worker) => worker.name === prefill);
    const d = state.decodes.findIndex((worker) => worker.name === decode);
    return p < 0 || d < 0 ? undefined : state.matrix.requests[p][d];
  };
}

// Counts of the last minute, and whether they are less than that.
function recentTimes() {
  const now = history[history.length - 1];
  const then = before(SPAN_S);
  const counts = now.ttft.counts.map((value, at) => value - then.ttft.counts[at]);
  const total = counts.reduce((sum, value) => sum + value, 0);
  return { counts, total, span: now.uptime_s - then.uptime_s };
}

// The share `q` lies below this time, which is assumed to grow evenly within a bucket.
function quantile(counts, edges, q) {
  const total = counts.reduce((sum, value) => sum + value, 0);
  if (total === 0) return null;
  let left = q * total;
  for (let at = 0; at < counts.length; at += 1) {
    if (left <= counts[at] && counts[at] > 0) {
      if (at >= edges.length) return edges[edges.length - 1];
      const low = at === 0 ? 0 : edges[at - 1];
      return low + ((edges[at] - low) * left) / counts[at];
    }
    left -= counts[at];
  }
  return edges[edges.length - 1];
}

// A figure and its last minute; `value` null is not known.
function figure(name, value, show, level) {
  const line = series.get(name) || [];
  if (!series.has(name)) series.set(name, line);
  line.push(value);
  if (line.length > SPAN_S / (POLL_MS / 1000)) line.shift();
  const [big, unit] = value === null ? ["–", ""] : show(value);
  const text = element("dd", { class: level || null }, big);
  if (unit) text.append(element("small", {}, unit));
  return element("div", {}, element("dt", {}, name), text, sparkline(line));
}

function sparkline(values) {
  const slots = SPAN_S / (POLL_MS / 1000);
  const svg = drawn("svg", { viewBox: `0 0 ${slots - 1} 20`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const most = Math.max(...values.map((value) => value || 0), 1e-9);
  const points = values
    .map((value, at) => (value === null ? null : `${slots - values.length + at},${19 - (18 * value) / most}`))
    .filter((point) => point !== null);
  svg.append(drawn("line", { x1: 0, x2: slots - 1, y1: 19.5, y2: 19.5 }), drawn("polyline", { points: points.join(" ") }));
  return svg;
}

function split(text) {
  const at = text.indexOf(" ");
  return at < 0 ? [text, ""] : [text.slice(0, at), text.slice(at + 1)];
}

function showFigures(state) {
  const served = (from) => (value) => from(value).reduce((sum, worker) => sum + worker.served, 0);
  const failed = (value) => [...value.prefills, ...value.decodes].reduce((sum, worker) => sum + worker.failures, 0);
  const recent = recentTimes();
  const times = recent.total > 0 ? recent.counts : state.ttft.counts;
  const percentile = (q) => quantile(times, state.ttft.edges_s, q);
  const plain = (value) => [count(value), ""];
  const perSecond = (value) => [rate(value), "/s"];
  const seconds = (value) => split(time(value));
  const wire = state.matrix.queued_bytes.concat(state.matrix.in_flight_bytes);
  const backlog = wire.flat().reduce((sum, value) => sum + value, 0);
  const waiting = state.queued_requests + state.requests_without_worker;
  const failing = growth(failed);
  byId("figures").replaceChildren(
    figure("requests", growth(served((value) => value.decodes)), perSecond),
    figure("in flight", state.live_requests, plain),
    figure("waiting", waiting, plain, waiting > 0 ? "warn" : ""),
    figure("TTFT p50", percentile(0.5), seconds),
    figure("TTFT p90", percentile(0.9), seconds),
    figure("TTFT p99", percentile(0.99), seconds),
    figure("transfer backlog", backlog, (value) => split(bytes(value))),
    figure("failures", failing, perSecond, failing > 0 ? "bad" : ""),
  );
}

function heat(value, most) {
  if (value <= 0 || most <= 0) return "";
  return `h${Math.max(1, Math.min(5, Math.ceil((value / most) * 5)))}`;
}

function cellNumbers(state, p, d) {
  const matrix = state.matrix;
  return {
    queued: matrix.queued_bytes[p][d],
    flying: matrix.in_flight_bytes[p][d],
    bandwidth: matrix.bytes_per_s[p][d],
    measured: matrix.measured[p][d],
    requests: growth(pairRequests(state.prefills[p].name, state.decodes[d].name)),
    total: matrix.requests[p][d],
  };
}

function cellText(numbers, dense) {
  const backlog = numbers.queued + numbers.flying;
  const size = dense ? shortBytes : bytes;
  const speed = numbers.bandwidth > 0 ? `${size(numbers.bandwidth)}${dense ? "" : "/s"}` : "–";
  const zero = dense ? "·" : "0";
  switch (measure) {
    case "bandwidth":
      return [numbers.measured || !dense ? speed : `~${speed}`, numbers.measured ? "measured" : "assumed"];
    case "requests":
      return [numbers.requests > 0 ? rate(numbers.requests) : zero, `${count(numbers.total)} in all`];
    default:
      return [backlog > 0 ? size(backlog) : zero, speed];
  }
}

function cellValue(numbers) {
  if (measure === "bandwidth") return numbers.bandwidth;
  if (measure === "requests") return numbers.requests;
  return numbers.queued + numbers.flying;
}

function pairText(state, p, d, numbers) {
  const { queued, flying, bandwidth, measured, requests, total } = numbers;
  const speed = bandwidth > 0 ? `${bytes(bandwidth)}/s ${measured ? "measured" : "assumed"}` : "bandwidth not known";
  return (
    `${state.prefills[p].name} → ${state.decodes[d].name}: ${bytes(queued)} queued, ${bytes(flying)} in flight, ` +
    `${speed}, ${rate(requests)} requests/s, ${count(total)} in all`
  );
}

// The table is built anew only when workers come or go, so that focus and scrolling stay.
function buildMatrix(state) {
  const table = byId("matrix");
  const key = JSON.stringify([state.prefills, state.decodes].map((list) => list.map((worker) => worker.name)));
  if (table.dataset.key === key) return;
  table.dataset.key = key;
  const dense = Math.max(state.prefills.length, state.decodes.length) >= DENSE_FROM;
  table.classList.toggle("dense", dense);
  const head = element("tr", {}, element("th", { scope: "col" }, element("span", { class: "hidden" }, "prefill")));
  const title = (mark, worker) => [element("b", {}, mark), ...(dense ? [] : [` ${worker.name}`])];
  state.decodes.forEach((worker, d) => {
    head.append(element("th", { scope: "col", title: worker.name }, ...title(`D${d}`, worker)));
  });
  const rows = state.prefills.map((worker, p) => {
    const row = element("tr", {}, element("th", { scope: "row", title: worker.name }, ...title(`P${p}`, worker)));
    state.decodes.forEach((_, d) => {
      const cell = element("td", { tabindex: p + d === 0 ? 0 : -1, "data-p": p, "data-d": d });
      cell.append(element("b"), element("i"));
      row.append(cell);
    });
    return row;
  });
  const parts = [element("thead", {}, head), element("tbody", {}, ...rows)];
  table.replaceChildren(table.caption, ...parts);
}

function showMatrix(state) {
  buildMatrix(state);
  const table = byId("matrix");
  const dense = table.classList.contains("dense");
  const cells = [...table.querySelectorAll("td")].map((cell) => {
    const [p, d] = [Number(cell.dataset.p), Number(cell.dataset.d)];
    return { cell, p, d, numbers: cellNumbers(state, p, d) };
  });
  const most = Math.max(0, ...cells.map(({ numbers }) => cellValue(numbers)));
  let detail = null;
  for (const { cell, p, d, numbers } of cells) {
    const [first, second] = cellText(numbers, dense);
    cell.firstChild.textContent = first;
    cell.lastChild.textContent = second;
    const value = cellValue(numbers);
    const isPicked = picked !== null && picked.p === p && picked.d === d;
    cell.className = [heat(value, most), value > 0 ? "" : "none", isPicked ? "picked" : ""].join(" ").trim();
    const text = pairText(state, p, d, numbers);
    cell.setAttribute("aria-label", text);
    if (isPicked) detail = text;
  }
  const hint = cells.length > 0 ? "Point at a cell, or move with the arrow keys, for all numbers of a pair." : "";
  byId("pair").textContent = detail || hint;
}

function showTimes(state) {
  const svg = byId("histogram");
  const recent = recentTimes();
  const all = state.ttft.counts.reduce((sum, value) => sum + value, 0);
  const counts = recent.total > 0 ? recent.counts : state.ttft.counts;
  byId("span").textContent =
    all === 0
      ? "no streamed answer yet"
      : recent.total > 0
        ? `${count(recent.total)} answers in ${age(recent.span)}`
        : `${count(all)} answers since the start, none in ${age(recent.span)}`;
  const { width, height } = svg.getBoundingClientRect();
  if (width === 0) return;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const edges = state.ttft.edges_s;
  // Only the part of the axis where anything has ever been, with a neighbour on each side.
  const used = state.ttft.counts.map((value, at) => (value > 0 ? at : -1)).filter((at) => at >= 0);
  const first = Math.max(0, (used.length ? used[0] : 4) - 1);
  const last = Math.min(counts.length - 1, Math.max(first + 7, (used.length ? used[used.length - 1] : 12) + 1));
  const [top, bottom] = [16, 18];
  const wide = width / (last - first + 1);
  const most = Math.max(1, ...counts);
  const parts = [drawn("line", { x1: 0, x2: width, y1: height - bottom, y2: height - bottom })];
  for (let at = first; at <= last; at += 1) {
    const x = (at - first) * wide;
    const tall = ((height - top - bottom) * counts[at]) / most;
    const shape = { x: x + 1, width: Math.max(1, wide - 2), y: height - bottom - tall, height: tall };
    const bar = drawn("rect", { ...shape, class: recent.total > 0 ? "now" : "past" });
    const upper = at < edges.length ? `up to ${time(edges[at])}` : `more than ${time(edges[edges.length - 1])}`;
    bar.append(drawn("title", {}, `${counts[at]} ${upper}`));
    parts.push(bar);
    if (at < last) {
      const label = time(edges[at]).replace(/(\.\d*?)0+ /, "$1 ").replace(". ", " ");
      parts.push(drawn("text", { x: x + wide, y: height - 5, "text-anchor": "middle" }, label));
    }
  }
  const place = (seconds) => {
    const at = edges.findIndex((edge) => seconds <= edge);
    const slot = at < 0 ? edges.length : at;
    const low = slot === 0 ? 0 : edges[slot - 1];
    const high = slot < edges.length ? edges[slot] : low * 2;
    return (slot - first + (seconds - low) / (high - low)) * wide;
  };
  const texts = [];
  let right = -Infinity;
  for (const [name, q] of [["p50", 0.5], ["p90", 0.9], ["p99", 0.99]]) {
    const value = quantile(counts, edges, q);
    if (value === null) continue;
    texts.push(`${name} ${time(value)}`);
    const x = place(value);
    parts.push(drawn("line", { class: "mark", x1: x, x2: x, y1: top, y2: height - bottom }));
    if (x > right + 26) {
      parts.push(drawn("text", { class: "mark", x, y: 11, "text-anchor": x > width - 20 ? "end" : "middle" }, name));
      right = x;
    }
  }
  byId("times-text").textContent = texts.join(", ");
  svg.replaceChildren(...parts);
}

function workerState(worker) {
  if (worker.draining) return ["warn", "draining"];
  if (worker.breaker === "open") return ["bad", "left out"];
  if (!worker.ready) return ["bad", "not ready"];
  return worker.breaker === "trial" ? ["warn", "on trial"] : ["good", "ready"];
}

function stateCell(worker) {
  const [level, text] = workerState(worker);
  return element("td", {}, element("span", { class: `state ${level}` }, text));
}

function number(value, show) {
  return element("td", {}, value === null ? "–" : show(value));
}

// The end of a pod's name tells it from its neighbours.
const shortName = (name) => (name.length > 21 ? `…${name.slice(-20)}` : name);

function ageCell(seconds) {
  if (seconds === null) return element("td", {}, "–");
  const level = seconds > 5 ? "bad" : seconds > 2.5 ? "warn" : "";
  return element("td", {}, element("span", { class: level }, time(seconds)));
}

function poolCell(worker) {
  if (worker.kv_tokens === null) return element("td", {}, "–");
  const text = count(worker.kv_tokens);
  if (!worker.kv_tokens_max) return element("td", {}, text);
  const share = Math.min(1, worker.kv_tokens / worker.kv_tokens_max);
  const level = share > 0.97 ? "bad" : share > 0.85 ? "warn" : "";
  const fill = element("i");
  fill.style.width = `${(share * 100).toFixed(0)}%`;
  const title = `${text} of ${count(worker.kv_tokens_max)} tokens`;
  const bar = element("span", { class: `meter ${level}`, "aria-hidden": "true" }, fill);
  return element("td", { title }, bar, element("span", { class: "share" }, `${(share * 100).toFixed(0)} %`));
}

function showWorkers(id, mark, workers, left, columns) {
  const section = byId(id);
  const ready = workers.filter((worker) => workerState(worker)[0] === "good").length;
  section.querySelector("p").textContent =
    `${ready} of ${workers.length} ready${left > 0 ? `, ${left} more not shown` : ""}`;
  const head = element("tr");
  for (const [name, title] of [["", ""], ["name", ""], ["state", ""], ...columns]) {
    head.append(element("th", { scope: "col", title: title || null }, name));
  }
  const rows = workers.map((worker, at) => {
    const row = element("tr", {}, element("th", { scope: "row" }, `${mark}${at}`));
    const title = `${worker.name}, ${worker.url}`;
    row.append(element("td", { class: "name", title }, shortName(worker.name)), stateCell(worker));
    row.append(...columns.map(([, , cell]) => cell(worker)));
    return row;
  });
  section.querySelector("table").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

function failuresCell(worker) {
  return element("td", {}, element("span", { class: worker.failures > 0 ? "bad" : "" }, count(worker.failures)));
}

function servedCell(role) {
  return (worker) => {
    const served = (state) => (named(state[role], worker.name) || {}).served;
    return element("td", {}, rate(growth(served)));
  };
}

function showState(state) {
  const left = state.workers_left_out;
  byId("about").textContent = `${state.version}, ${state.policy}, up ${age(state.uptime_s)}`;
  const health = byId("health");
  const can = state.ready_prefills > 0 && state.ready_decodes > 0;
  health.className = `state ${state.draining ? "warn" : can ? "good" : "bad"}`;
  const pairs = `${state.ready_prefills} prefill and ${state.ready_decodes} decode ready`;
  health.textContent = state.draining ? "draining" : can ? pairs : `no pair can be formed: ${pairs}`;
  showFigures(state);
  showMatrix(state);
  showTimes(state);
  const live = ["live", "requests it holds", (worker) => number(worker.live_requests, count)];
  const failures = ["failed", "failures since it joined", failuresCell];
  const telemetry = ["seen", "age of its telemetry", (worker) => ageCell(worker.telemetry_age_s)];
  showWorkers("prefills", "P", state.prefills, left, [
    live,
    ["done/s", "complete answers per second", servedCell("prefills")],
    ["tokens", "prompt tokens that wait or are computed", (worker) => number(worker.queued_tokens, count)],
    ["to send", "KV cache that it still has to send", (worker) => number(worker.egress_bytes, bytes)],
    telemetry,
    failures,
  ]);
  showWorkers("decodes", "D", state.decodes, left, [
    live,
    ["done/s", "complete answers per second", servedCell("decodes")],
    ["KV pool", "tokens taken or booked", poolCell],
    telemetry,
    failures,
  ]);
}

function showContact(error) {
  const contact = byId("contact");
  const silent = lastContact === null ? Infinity : (performance.now() - lastContact) / 1000;
  const isLost = error !== null && silent > 2.5;
  document.body.classList.toggle("stale", isLost);
  contact.className = `state ${isLost ? "bad" : "good"}`;
  const text = !isLost ? "live" : lastContact === null ? `no contact: ${error}` : `no contact for ${age(silent)}`;
  if (contact.textContent !== text) contact.textContent = text;
}

async function poll() {
  try {
    const answer = await fetch("/debug/state", { signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" });
    if (!answer.ok) throw new Error(`the router answered ${answer.status}`);
    const state = await answer.json();
    const last = history[history.length - 1];
    // Less uptime than before: another process, whose counters begin anew.
    if (last && state.uptime_s < last.uptime_s) {
      history.length = 0;
      series.clear();
    }
    history.push(state);
    while (state.uptime_s - history[0].uptime_s > SPAN_S + 2 * (POLL_MS / 1000)) history.shift();
    lastContact = performance.now();
    showState(state);
    showContact(null);
  } catch (error) {
    if (error instanceof TypeError && !/fetch|network/i.test(error.message)) throw error;
    showContact(error.message);
  }
}

async function run() {
  for (;;) {
    if (!document.hidden) await poll();
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

function pick(cell) {
  picked = cell ? { p: Number(cell.dataset.p), d: Number(cell.dataset.d) } : null;
  if (history.length > 0) showMatrix(history[history.length - 1]);
}

byId("matrix").addEventListener("pointerover", (event) => pick(event.target.closest("td")));
byId("matrix").addEventListener("pointerleave", () => pick(null));
byId("matrix").addEventListener("focusin", (event) => pick(event.target.closest("td")));
byId("matrix").addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const cell = event.target.closest("td");
  const move = moves[event.key];
  if (!cell || !move) return;
  const [p, d] = [Number(cell.dataset.p) + move[0], Number(cell.dataset.d) + move[1]];
  const next = byId("matrix").querySelector(`td[data-p="${p}"][data-d="${d}"]`);
  if (!next) return;
  event.preventDefault();
  cell.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
for (const input of document.querySelectorAll("#measures input")) {
  input.addEventListener("change", () => {
    measure = input.value;
    if (history.length > 0) showMatrix(history[history.length - 1]);
  });
}
window.addEventListener("resize", () => history.length > 0 && showTimes(history[history.length - 1]));
run();
