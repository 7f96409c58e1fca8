// What all parts of the page use: the data, the choice that is being looked at, colours, and elements made of text only.
const data = JSON.parse(document.getElementById('data').textContent);
const chosen = { task: 0, metric: 0, axis: 'kept', setting: null, run: null };
const measure = new Map(data.measures.map((name, i) => [name, i]));
const wide = window.matchMedia('(min-width: 700px)');
const dark = window.matchMedia('(prefers-color-scheme: dark)');

// Okabe and Ito's colours, told apart without colour vision too; markers and dashes differ besides.
const LIGHT = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000'];
const DARK = ['#56b4e9', '#e69f00', '#2fc39b', '#cc79a7', '#f0e442', '#ef7a3a', '#ffffff'];
const SYMBOLS = ['circle', 'square', 'diamond', 'triangle-up', 'cross', 'star', 'x', 'triangle-down', 'pentagon', 'hexagram'];
const DASHES = ['solid', 'dash', 'dot', 'dashdot'];
const mechanisms = [...new Set(data.settings.map((s) => s.mechanism))].sort();

const byId = (id) => document.getElementById(id);
const palette = () => (dark.matches ? DARK : LIGHT);
const colour = (i) => palette()[i % palette().length];
const symbol = (name) => SYMBOLS[mechanisms.indexOf(name) % SYMBOLS.length];
const tint = (name) => colour(mechanisms.indexOf(name));
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const task = () => data.tasks[chosen.task];
const metric = () => task().metrics[chosen.metric];
const beside = (name, other) => `${name.split('/')[0]}/${other}`;
const spread = (setting, name) => setting.spreads[measure.get(name)];
const value = (run, name) => run.values[measure.get(name)];
const short = (name) => name.replace(/^test\//, 'test ').replace(/^val\//, 'validation ');

function number(x, digits = 4) {
  if (x === null || x === undefined) return '–';
  if (Math.abs(x) >= 1000) return x.toLocaleString('en', { maximumFractionDigits: 0 });
  return Math.abs(x) >= 10 ? x.toFixed(2) : x.toFixed(digits);
}
const written = (s) => (s ? number(s[0]) + (s[1] === null ? '' : ` ± ${number(s[1])}`) : '–');

// Plotly reads some tags in text; none is ours.
const plain = (text) => String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');

function element(tag, content, attributes = {}) {
  const node = document.createElement(tag);
  for (const part of [content].flat()) if (part !== null && part !== undefined) node.append(part);
  for (const [key, to] of Object.entries(attributes)) {
    if (key.startsWith('on')) node.addEventListener(key.slice(2), to);
    else if (to !== null) node.setAttribute(key, to);
  }
  return node;
}

function layout(extra) {
  const axis = { gridcolor: css('--line'), zerolinecolor: css('--line'), linecolor: css('--faint'), automargin: true, ticks: '', tickfont: { size: 12, color: css('--soft') } };
  const merged = {
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css('--ink') },
    margin: { l: 48, r: 10, t: strip(), b: 40 }, hovermode: 'closest', dragmode: wide.matches ? 'zoom' : false,
    hoverlabel: { bgcolor: css('--panel'), bordercolor: css('--faint'), font: { color: css('--ink'), size: 13 }, align: 'left' },
    modebar: { bgcolor: 'rgba(0,0,0,0)', color: css('--faint'), activecolor: css('--ink') },
    legend: { orientation: 'h', x: 0, y: 0, yref: 'container', yanchor: 'bottom', font: { size: 12 }, itemwidth: 30 }, ...extra,
  };
  const titled = (own = {}) => ({ ...axis, ...own, title: { standoff: 8, font: { size: 13, color: css('--soft') }, ...own.title } });
  merged.xaxis = titled(extra.xaxis);
  merged.yaxis = titled(extra.yaxis);
  return merged;
}

// The mode bar lies over the top of a plot: nothing else may be drawn there.
const strip = () => (config.displayModeBar ? 32 : 10);
const config = { displaylogo: false, showSendToCloud: false, responsive: true, displayModeBar: wide.matches ? 'hover' : false, modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d'] };
const draw = (id, traces, extra) => Plotly.react(byId(id), traces, layout(extra), config);
// Around a single value Plotly draws two units of axis, below zero too: it then begins at zero.
const spanOf = (traces) => (new Set(traces.flatMap((trace) => trace.y)).size === 1 ? { rangemode: 'tozero' } : {});
const show = (id, on) => { byId(id).hidden = !on; };

// Plots further down are drawn when they come near the window: the first screen does not wait for them.
const waiting = new Map(), near = new Set();
const watcher = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
  if (isIntersecting) near.add(target.id); else near.delete(target.id);
  if (isIntersecting) drawWaiting(target.id);
}), { rootMargin: '400px' });

function drawWaiting(id) {
  const drawIt = waiting.get(id);
  waiting.delete(id);
  if (drawIt) drawIt();
}

function whenNear(id, drawIt) {
  waiting.set(id, drawIt);
  if (near.has(id)) drawWaiting(id);
  watcher.observe(byId(id));
}
window.addEventListener('beforeprint', () => [...waiting.keys()].forEach(drawWaiting));
