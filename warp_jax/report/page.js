"use strict";
// Draws the page from the JSON in #data. Texts come into the page by textContent only, so that none of them runs.

const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]; // Okabe and Ito, seen on white and black
const DASHES = ["solid", "dot", "dash", "dashdot"];
const PLACE = ["stage", "iteration", "run", "eta", "step"];
const AXES = { sft_kl: "KL to SFT (nats per completion)", gold_reward: "gold reward", anchor_kl: "KL to the anchor (nats)" };
const CONFIG = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
const PRINT_WIDTH = 680; // pixels, of a page of paper

const $ = (id) => document.getElementById(id);
const all = JSON.parse($("data").textContent);
const works = all.workdirs;
const many = works.length > 1;
const charts = new Map(); // id -> a function that returns traces and layout
let work = works[0];
let printing = false;

// ---------------------------------------------------------------- helpers

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const shown = (value) => {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  return Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
};
const safe = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;"); // Plotly reads some tags
const axisName = (name) => AXES[name] ?? name.replaceAll("_", " ");
const iterationsOf = (w) => [...new Set(w.rows.filter((row) => row.stage === "liti").map((row) => row.iteration))].sort((a, b) => a - b);
const last = (list) => list[list.length - 1];

function label(row) {
  const parts = row.stage === "sft" ? ["SFT"] : [`iteration ${row.iteration}`];
  if (row.run) parts.push(`run ${row.run}`);
  if (row.stage === "policy") parts.push(`step ${row.step}`);
  else if (["merged", "anchor", "average"].includes(row.stage)) parts.push(row.stage);
  if (row.eta) parts.push(`eta ${row.eta}`);
  return parts.join(", ");
}

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => el("option", { value }, text)));
  if (chosen !== undefined) select.value = chosen;
}

/** A table of rows {column: value}. sortable: its headers are buttons. */
function table(rows, name, sortable = false) {
  if (!rows.length) return el("p", { class: "muted" }, "No rows.");
  const columns = Object.keys(rows[0]);
  const kind = (column) => ({ class: rows.some((row) => typeof row[column] === "number") ? "number" : column });
  const body = el("tbody");
  const fill = (list) => body.replaceChildren(
    ...list.map((row) => el("tr", {}, ...columns.map((c) => el("td", kind(c), shown(row[c]))))),
  );
  const heads = columns.map((column) => {
    const head = el("th", { scope: "col", ...kind(column) });
    head.append(sortable ? el("button", { type: "button", onclick: () => sort(head, column) }, column) : column);
    return head;
  });
  function sort(head, column) {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
    const empty = (value) => value === null || value === undefined;
    fill([...rows].sort(({ [column]: a }, { [column]: b }) => (empty(a) || empty(b) ? empty(a) - empty(b) : sign * compare(a, b))));
  }
  fill(rows);
  const whole = el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body);
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, whole);
}

const titled = ({ title, note, rows }) => [el("h3", {}, title), ...(note ? [el("p", {}, note)] : []), table(rows, title)];

// ---------------------------------------------------------------- charts

const isDark = () => !printing && matchMedia("(prefers-color-scheme: dark)").matches;

function themed(layout) {
  const [text, line, back] = isDark() ? ["#e6e9ed", "#3a434d", "#1e242b"] : ["#1b1f24", "#d0d7de", "#ffffff"];
  const axis = (own) => ({ gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, ...own });
  return {
    font: { color: text, family: "system-ui, sans-serif", size: 13 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 55, r: 15, t: 30, b: 45 }, hoverlabel: { align: "left", bgcolor: back, bordercolor: line, font: { color: text } },
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom" }, hovermode: "closest",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: text },
    ...layout, xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis), ...(layout.yaxis2 ? { yaxis2: axis(layout.yaxis2) } : {}),
    ...(printing ? { width: $(layout.id)?.closest(".grid") ? PRINT_WIDTH / 2 - 10 : PRINT_WIDTH } : { autosize: true }),
  };
}

function draw(id) {
  if (!window.Plotly || !charts.has(id)) return;
  const { traces, layout } = charts.get(id)();
  const node = $(id);
  node.hidden = !traces.length;
  if (layout.height) node.style.height = `${layout.height}px`;
  const config = { ...CONFIG, displayModeBar: id.startsWith("curve-") || printing ? false : "hover" };
  if (traces.length) Plotly.react(node, traces, themed({ ...layout, id }), config);
}
const drawAll = () => [...charts.keys()].forEach(draw);

/** Half widths of the 95 % intervals of a column; undefined if it has no standard errors. */
function intervals(w, rows, column) {
  const errors = rows.map((row) => row[`${column}_se`] ?? 0);
  if (w.half_width === null || !errors.some((error) => error > 0)) return undefined;
  return { type: "data", array: errors.map((error) => error * w.half_width), thickness: 1, width: 3 };
}

function hover(row) {
  const numbers = Object.entries(row).filter(([name, x]) => typeof x === "number" && !PLACE.includes(name) && !name.endsWith("_se"));
  const lines = numbers.map(([name, x]) => {
    const error = row[`${name}_se`];
    return `${safe(name)}: ${shown(x)}${error ? ` ± ${shown(error)} (SE)` : ""}`;
  });
  const command = row.export ? safe(row.export).replaceAll(" --", "<br>  --") : "not saved as a stage: it cannot be exported";
  return [`<b>${safe(label(row))}</b>`, ...lines, command].join("<br>");
}

/** Traces of one workdir: a column against another, for fronts, merges, runs and the fronts of anchors and averages. */
function frontTraces(w, x, y) {
  const number = works.indexOf(w);
  const prefix = many ? `${safe(w.name)}: ` : "";
  const [sft] = w.rows;
  const trace = (rows, color, more) => ({
    type: "scatter", x: rows.map((row) => row[x]), y: rows.map((row) => row[y]), error_y: intervals(w, rows, y),
    ...(x === "reward" ? { error_x: intervals(w, rows, x) } : {}),
    text: rows.map(hover), hoverinfo: "text", customdata: rows.map((row) => [number, w.rows.indexOf(row)]), ...more,
    marker: { color, size: 8, ...more.marker }, line: { color, ...more.line },
  });
  const traces = [];
  const iterations = [...new Set(w.rows.slice(1).map((row) => row.iteration))].sort((a, b) => a - b);
  for (const i of iterations) {
    const color = COLORS[(many ? number : i - 1) % COLORS.length];
    const dash = DASHES[(many ? i - 1 : 0) % DASHES.length];
    const of = (stage) => w.rows.filter((row) => row.stage === stage && row.iteration === i);
    const front = [sft, ...of("liti")].sort((a, b) => a.eta - b.eta);
    if (front.length > 1) traces.push(trace(front, color, { name: `${prefix}front of iteration ${i}`, mode: "lines+markers", line: { dash } }));
    for (const stage of ["anchor", "average"]) {
      for (const run of new Set(of(stage).map((row) => row.run))) {
        const rows = [sft, ...of(stage).filter((row) => row.run === run)];
        const style = { mode: "lines+markers", line: { dash: stage === "anchor" ? "dot" : "dashdot" }, marker: { size: 5 } };
        traces.push(trace(rows, color, { name: `${prefix}${stage} of iteration ${i}, run ${run}`, ...style }));
      }
    }
    if (of("policy").length) {
      traces.push(trace(of("policy"), color, { name: `${prefix}runs of iteration ${i}`, mode: "markers", marker: { symbol: "x", opacity: 0.65, size: 7 } }));
    }
    if (of("merged").length) {
      traces.push(trace(of("merged"), color, { name: `${prefix}merge ${i}`, mode: "markers", marker: { symbol: "diamond-open", size: 13, line: { width: 2 } } }));
    }
  }
  traces.push(trace([sft], "#808890", { name: `${prefix}SFT`, mode: "markers", marker: { symbol: "square" } }));
  return traces.filter((one) => one.y.some((value) => value !== null && value !== undefined));
}

charts.set("front-chart", () => {
  const column = $("measure").value;
  const budget = chosenBudget();
  const line = { type: "line", xref: "x", yref: "paper", y0: 0, y1: 1, line: { dash: "dot", width: 1.5, color: "#808890" } };
  const note = { yref: "paper", y: 1.06, showarrow: false, text: "KL budget" };
  return {
    traces: works.flatMap((w) => frontTraces(w, "sft_kl", column)),
    layout: {
      xaxis: { title: { text: AXES.sft_kl } }, yaxis: { title: { text: axisName(column) } },
      ...(budget ? { shapes: [{ ...line, x0: budget.budget, x1: budget.budget }], annotations: [{ ...note, x: budget.budget }] } : {}),
    },
  };
});

charts.set("gold-chart", () => ({
  traces: frontTraces(work, "reward", "gold_reward"),
  layout: { xaxis: { title: { text: "reward" } }, yaxis: { title: { text: "gold reward" } } },
}));

charts.set("budget-chart", () => {
  const rows = (work.budgets[$("budget-front").value] ?? []).filter((row) => row.eta !== undefined);
  const chosen = chosenBudget();
  const trace = (column, more) => ({ type: "scatter", mode: "lines", x: rows.map((r) => r.budget), y: rows.map((r) => r[column]), ...more });
  const line = { type: "line", xref: "x", yref: "paper", y0: 0, y1: 1, line: { dash: "dot", width: 1.5, color: "#808890" } };
  return {
    traces: rows.length
      ? [
        trace("reward", { name: "reward of the best eta", line: { color: COLORS[0], shape: "hv" } }),
        trace("probability_within_budget", { name: "probability of keeping the budget", yaxis: "y2", line: { color: COLORS[1], dash: "dash" } }),
      ]
      : [],
    layout: {
      xaxis: { title: { text: "KL budget (nats per completion)" } }, yaxis: { title: { text: "reward" } },
      yaxis2: { title: { text: "probability" }, overlaying: "y", side: "right", range: [0, 1.05], showgrid: false, tickmode: "array", tickvals: [0, 0.25, 0.5, 0.75, 1] },
      shapes: chosen ? [{ ...line, x0: chosen.budget, x1: chosen.budget }] : [],
    },
  };
});

function heat(id, rowsOf, axis, unit, range) {
  charts.set(id, () => {
    const found = work.geometry.flatMap((one) => rowsOf(one));
    const units = work.geometry[0]?.units ?? [];
    const trace = {
      type: "heatmap", x: units, y: found.map(([name]) => name), z: found.map(([, values]) => values), colorscale: "Cividis", ...range,
      colorbar: { title: { text: unit, side: "right" }, thickness: 12 }, hovertemplate: `${axis} %{y}<br>%{x}<br>%{z:.4g} ${unit}<extra></extra>`,
    };
    return { traces: found.length ? [trace] : [], layout: { xaxis: { type: "category", title: { text: "unit of the merge" } }, yaxis: { type: "category", title: { text: axis }, autorange: "reversed" }, height: Math.max(340, 140 + 18 * found.length) } };
  });
}
heat("angle-chart", (one) => one.angles.map((row, p) => [`${one.iteration}: ${one.pairs[p]}`, row]), "iteration: runs", "degrees", { zmin: 0 });
heat("norm-chart", (one) => one.norms.map((row, m) => [`${one.iteration}: ${m + 1}`, row]), "iteration: run", "norm", {});

// ---------------------------------------------------------------- sections

function fillFront() {
  const [sft] = work.rows;
  const measures = Object.keys(sft).filter(
    (name) => ![...PLACE, "sft_kl", "export"].includes(name) && !name.endsWith("_se") && works.some((w) => w.rows.some((r) => typeof r[name] === "number")),
  );
  options($("measure"), measures.map((name) => [name, axisName(name)]), measures.includes($("measure").value) ? $("measure").value : "reward");
  options($("point"), work.rows.map((row, i) => [i, label(row)]), work.rows.length - 1);
  const has = work.half_width !== null;
  $("front-note").textContent = has ? `Bars are 95 % intervals over prompts (${shown(work.half_width)} standard errors).` : "Too few prompts for intervals.";
  showPoint();
}

function showPoint() {
  const row = work.rows[$("point").value];
  const pair = ([name, x]) => el("div", {}, el("dt", {}, name), el("dd", {}, shown(x) + (row[`${name}_se`] ? ` ± ${shown(row[`${name}_se`])} (SE)` : "")));
  const numbers = Object.entries(row).filter(([name, x]) => typeof x === "number" && !name.endsWith("_se") && !PLACE.includes(name));
  $("point-numbers").replaceChildren(el("dl", { class: "numbers" }, ...numbers.map(pair)));
  $("command").textContent = row.export ?? "The weights of this policy are not saved as a stage, so it cannot be exported.";
  $("copy").hidden = !row.export || !navigator.clipboard;
  $("copy").textContent = "Copy";
}

async function copy() {
  await navigator.clipboard.writeText($("command").textContent);
  $("copy").textContent = "Copied";
}

const chosenBudget = () => work.budgets[$("budget-front").value]?.[$("budget-range").value];

function fillBudget() {
  const iterations = Object.keys(work.budgets);
  $("budget").hidden = !iterations.length;
  options($("budget-front"), iterations.map((i) => [i, i]), last(iterations));
  if (iterations.length) startBudget();
}

function startBudget() {
  const rows = work.budgets[$("budget-front").value];
  const range = $("budget-range");
  const given = rows.findIndex((row) => row.budget === work.kl_budget);
  range.max = rows.length - 1;
  range.value = given > 0 ? given : Math.round((rows.length - 1) / 2);
  showBudget();
}

function showBudget() {
  const row = chosenBudget();
  const text = `${shown(row.budget)} nats`;
  $("budget-value").textContent = text;
  $("budget-range").setAttribute("aria-valuetext", text);
  $("budget-best").textContent = row.eta === undefined
    ? "No eta of the front is within this budget."
    : `Best eta: ${shown(row.eta)}, with reward ${shown(row.reward)} at ${shown(row.sft_kl)} nats; within the budget with probability ${row.probability_within_budget.toFixed(2)}.`;
  draw("front-chart");
  draw("budget-chart");
}

function fillAnswers() {
  const iterations = iterationsOf(work);
  const missing = typeof work.answers === "string";
  $("answers-controls").hidden = missing || !iterations.length;
  $("answers-note").textContent = missing ? work.answers : iterations.length ? "" : "No front is evaluated yet: these are the answers of SFT.";
  options($("answers-front"), iterations.map((i) => [i, i]), last(iterations));
  startAnswers();
}

/** The answers of SFT and of the chosen iteration's front, by eta. */
const answered = () => work.answers.fronts
  .filter((one) => one.iteration === 0 || (one.iteration === Number($("answers-front").value) && one.eta !== 0))
  .sort((a, b) => a.eta - b.eta);

function startAnswers() {
  if (typeof work.answers === "string") return $("answers-list").replaceChildren();
  $("eta").max = answered().length - 1;
  $("eta").value = answered().length - 1;
  return showAnswers();
}

function showAnswers() {
  const fronts = answered();
  const [sft] = fronts;
  const one = fronts[$("eta").value];
  const text = one.iteration ? shown(one.eta) : "0 (SFT)";
  $("eta-value").textContent = text;
  $("eta").setAttribute("aria-valuetext", text);
  $("answers-list").replaceChildren(...work.answers.prompts.map((prompt, i) => {
    const gold = one.gold_reward[i] === null ? "" : `, gold reward ${shown(one.gold_reward[i])} (SFT ${shown(sft.gold_reward[i])})`;
    const reward = `reward ${shown(one.reward[i])} (SFT ${shown(sft.reward[i])})${gold}, KL to SFT ${shown(one.sft_kl[i])} nats`;
    return el("div", { class: "answer" },
      el("p", { class: "text" }, el("span", { class: "asked" }, prompt), one.texts[i]), el("p", { class: "reward" }, reward));
  }));
}

const runName = (run) => `iteration ${run.iteration}, run ${run.run}`;

function fillCurves() {
  [...charts.keys()].filter((id) => id.startsWith("curve-")).forEach((id) => charts.delete(id));
  const runs = work.curves;
  const boxes = runs.map((run, i) => el("label", {}, el("input", { type: "checkbox", value: i, checked: "", onchange: drawCurves }), ` ${runName(run)} `));
  $("runs").replaceChildren(el("legend", {}, "Runs"), ...boxes);
  $("runs").hidden = !runs.length;
  const every = Math.max(1, ...runs.map((run) => run.every));
  $("curves-note").textContent = !runs.length
    ? "This workdir has no metrics.jsonl with rows."
    : every > 1 ? `Each point is the mean of up to ${every} steps.` : "";
  const first = ["reward", "anchor_kl", "length"];
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.values)))];
  const rank = (name) => (first.includes(name) ? first.indexOf(name) : /^reward\//.test(name) ? 3 : /^drift\//.test(name) ? 4 : 5);
  names.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  const held = work.rows.some((row) => row.stage === "policy") ? ["reward", "sft_kl"] : [];
  const ids = [...held.map((name) => [name, true]), ...names.map((name) => [name, false])].map(([name, isHeld], i) => {
    charts.set(`curve-${i}`, () => curve(name, isHeld));
    return el("div", { class: "chart", id: `curve-${i}`, role: "img", "aria-label": `${isHeld ? "held-out " : ""}${axisName(name)} by training step` });
  });
  $("curve-charts").replaceChildren(...ids);
  const high = work.drift.filter((row) => row.high).length;
  const warning = `Warning: in ${high} of ${work.drift.length} runs, more than 5 % of the tokens were sampled with a probability that differs by over 10 % `
    + "from that of the update. Set rl.importance_cap (for example to 2.0), or model.dtype to float32.";
  $("drift").replaceChildren(...(work.drift.length ? [
    el("h3", {}, "Drift between sampler and update"),
    el("p", {}, "Log-probability of the sampler minus that of the update, in nats per token; 0 without rounding. mean, std, max: mean, standard deviation and "
      + "largest absolute value. outside: share of tokens with a probability ratio outside [0.9, 1.1]. Each is the mean over the steps of a run."),
    ...(high ? [el("p", { class: "warning" }, warning)] : []),
    table(work.drift.map(({ high: _, ...row }) => row), "Drift between sampler and update"),
  ] : []));
}

function curve(name, isHeld) {
  const chosen = new Set([...$("runs").querySelectorAll("input:checked")].map((box) => runName(work.curves[box.value])));
  const runs = isHeld
    ? [...new Set(work.rows.filter((row) => row.stage === "policy").map(runName))].map((key) => {
      const rows = work.rows.filter((row) => row.stage === "policy" && runName(row) === key);
      return { ...rows[0], steps: rows.map((row) => row.step), values: { [name]: rows.map((row) => row[name]) }, error_y: intervals(work, rows, name) };
    })
    : work.curves.filter((run) => name in run.values);
  const traces = runs.filter((run) => !work.curves.length || chosen.has(runName(run))).map((run) => ({
    type: "scatter", mode: isHeld ? "lines+markers" : "lines", name: runName(run), x: run.steps, y: run.values[name], error_y: run.error_y,
    line: { color: COLORS[(run.iteration - 1) % COLORS.length], dash: DASHES[(run.run - 1) % DASHES.length], width: 1.5 },
    hovertemplate: `${runName(run)}<br>step %{x}: %{y:.4g}<extra></extra>`,
  }));
  const title = `${isHeld ? "held-out " : ""}${isHeld && name === "sft_kl" ? "KL to SFT" : axisName(name)}`;
  return { traces, layout: { title: { text: safe(title), font: { size: 13 }, x: 0.02 }, showlegend: false, xaxis: { title: { text: "step" } }, yaxis: {}, margin: { l: 45, r: 10, t: 32, b: 38 } } };
}
const drawCurves = () => [...charts.keys()].filter((id) => id.startsWith("curve-")).forEach(draw);

function fillProgress() {
  const { finished, steps, left, parts, written } = work.progress;
  $("progress").hidden = finished;
  const percent = steps[1] ? ` (${Math.round((100 * steps[0]) / steps[1])} %)` : "";
  const words = [`${steps[0]} of ${steps[1]} training steps are done${percent}`, left].filter(Boolean);
  $("left").textContent = `${words.join("; ")}. Written at ${written}; the job writes this page again after evaluations, at most once a minute.`;
  $("parts").replaceChildren(table(parts, "Parts of the job"));
}

function fillRest() {
  $("summary").textContent = work.summary || "This job is not finished: the page shows what is evaluated up to now, without comparisons.";
  $("tables").replaceChildren(...work.tables.flatMap(titled));
  $("comparisons").hidden = !work.tables.length;
  $("gold").hidden = !work.rows.some((row) => typeof row.gold_reward === "number");
  $("rows").replaceChildren(table(work.rows, "All evaluated policies", true));
  $("starts").replaceChildren(table(work.starts, "Starts of the program"));
  $("settings").textContent = JSON.stringify(work.config, null, 2);
  const pairs = work.geometry.some((one) => one.pairs.length);
  $("geometry-note").textContent = !work.geometry.length
    ? "This workdir has no geometry.json with norms."
    : pairs
      ? "A task vector is a run's policy minus the start of its iteration. 90 degrees: orthogonal."
      : "There is only one run in an iteration, so there are no angles.";
}

function csv() {
  const columns = Object.keys(work.rows[0]);
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...work.rows.map((row) => columns.map((c) => row[c]))].map((cells) => cells.map(cell).join(",") + "\n").join("");
}

function download() {
  const url = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  el("a", { href: url, download: `${work.name}_front.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function fill() {
  fillProgress();
  fillFront();
  fillBudget();
  fillAnswers();
  fillCurves();
  fillRest();
  const sections = [...document.querySelectorAll("main > section")].filter((section) => !section.hidden);
  document.querySelector("nav").replaceChildren(
    ...sections.map((section) => el("a", { href: `#${section.id}` }, section.querySelector("h2").textContent)),
  );
  drawAll();
}

// ---------------------------------------------------------------- start

async function loadPlotly() {
  const packed = Uint8Array.from(atob($("plotly").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(el("script", {}, await new Response(stream).text())); // the policy of the page has its hash
  drawAll();
  $("front-chart").on("plotly_click", ({ points: [{ customdata: [number, row] }] }) => {
    if (works[number] !== work) {
      $("work").value = number;
      work = works[number];
      fill();
    }
    $("point").value = row;
    showPoint();
  });
  document.body.dataset.ready = "";
}

options($("work"), works.map((w, i) => [i, w.name]), 0);
$("which").hidden = !many;
$("compared").hidden = !many;
$("compared-tables").append(...all.compared.flatMap(titled));
for (const [id, event, act] of [
  ["work", "change", () => { work = works[$("work").value]; fill(); }],
  ["measure", "change", () => draw("front-chart")],
  ["point", "change", showPoint],
  ["copy", "click", copy],
  ["budget-front", "change", startBudget],
  ["budget-range", "input", showBudget],
  ["answers-front", "change", startAnswers],
  ["eta", "input", showAnswers],
  ["csv", "click", download],
]) $(id).addEventListener(event, act);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
for (const [event, state] of [["beforeprint", true], ["afterprint", false]]) {
  addEventListener(event, () => { printing = state; drawAll(); });
}
fill();
loadPlotly();
