// The Pareto front, the card of the chosen setting, and the front as a table.
const MOST = 1000; // points off the front that are drawn
let order = []; // settings as the arrow keys pass them

function frontPlaces() {
  const found = data.fronts.find(([t, m, axis]) => t === chosen.task && m === metric().name && axis === chosen.axis);
  return found ? found[3] : [];
}

function drawFront() {
  const y = metric().name, x = beside(y, chosen.axis), front = frontPlaces(), on = new Set(front);
  const known = data.settings.map((s, i) => i).filter((i) => {
    const s = data.settings[i];
    return s.task === chosen.task && spread(s, y) && spread(s, x);
  });
  const off = known.filter((i) => !on.has(i));
  const step = Math.max(1, off.length / MOST);
  const drawn = Array.from({ length: Math.min(off.length, MOST) }, (_, i) => off[Math.floor(i * step)]);
  order = [...front, ...drawn].sort((a, b) => spread(data.settings[a], x)[0] - spread(data.settings[b], x)[0]);

  const traces = [];
  if (front.length) {
    traces.push({ x: front.map((i) => spread(data.settings[i], x)[0]), y: front.map((i) => spread(data.settings[i], y)[0]), mode: 'lines',
      line: { shape: 'hv', color: css('--faint'), width: 1.5 }, hoverinfo: 'skip', showlegend: false });
  }
  for (const name of mechanisms) {
    for (const [places, good] of [[drawn, false], [front, true]]) {
      const own = places.filter((i) => data.settings[i].mechanism === name);
      if (own.length) traces.push(points(own, name, good, x, y, known.length > 400));
    }
  }
  const lines = denseLines(known, y);
  draw('front-plot', traces, {
    xaxis: { title: { text: chosen.axis === 'kept' ? 'kept ÷ visible pairs' : 'compute: attention MACs ÷ dense' }, rangemode: 'tozero' },
    yaxis: { title: { text: short(y) }, ...spanOf(traces) }, shapes: lines.shapes, annotations: lines.annotations,
  });
  const thinned = drawn.length < off.length ? ` ${drawn.length.toLocaleString('en')} of ${off.length.toLocaleString('en')} points off the front are drawn.` : '';
  const seeds = known.length <= 400 && known.some((i) => data.settings[i].runs.length > 1) ? ' Bars are one standard deviation over seeds.' : '';
  byId('front-note').textContent = `${short(y)}, ${metric().lower ? 'lower' : 'higher'} is better, against ${chosen.axis}. Filled: on the front. Grey and open: something is better and cheaper.${seeds}${thinned}`;
  byId('front-warning').textContent = task().note;
  show('front-warning', task().note !== '');
  drawFrontTable(front, x, y);
  if (!known.includes(chosen.setting)) chosen.setting = front.length ? front[0] : (known[0] ?? null);
  drawCard();
}

function points(own, name, good, x, y, many) {
  const at = (key, part) => own.map((i) => spread(data.settings[i], key)[part]);
  const bars = (key) => ({ type: 'data', array: at(key, 1).map((d) => d ?? NaN), visible: !many, thickness: 1, width: 3, color: good ? tint(name) : css('--faint') });
  return {
    x: at(x, 0), y: at(y, 0), customdata: own, mode: 'markers', name: plain(name), legendgroup: name,
    showlegend: good || !frontPlaces().some((i) => data.settings[i].mechanism === name),
    error_x: bars(x), error_y: bars(y),
    marker: { symbol: symbol(name) + (good ? '' : '-open'), size: good ? 12 : 9, color: good ? tint(name) : css('--faint'), line: { width: good ? 1 : 1.5, color: good ? css('--panel') : css('--faint') } },
    text: own.map((i) => hoverText(i, x, y)), hovertemplate: '%{text}<extra></extra>',
  };
}

function hoverText(i, x, y) {
  const s = data.settings[i];
  const command = data.runs[s.runs[0]].command;
  const lines = [s.label, `${short(y)} ${written(spread(s, y))}`, `${chosen.axis} ${written(spread(s, x))}`, ...(command ? ['', ...wrapped(command)] : [])];
  return lines.map(plain).join('<br>');
}

function wrapped(text, width = wide.matches ? 64 : 38) {
  const lines = [''];
  for (const word of text.split(' ')) {
    if (lines[lines.length - 1].length + word.length > width) lines.push('   ');
    lines[lines.length - 1] += (lines[lines.length - 1].trim() ? ' ' : '') + word;
  }
  return lines;
}

function denseLines(known, y) {
  const lower = metric().lower;
  let dense = known.filter((i) => data.settings[i].mechanism === 'dense' && !data.settings[i].evaluation);
  dense.sort((a, b) => (spread(data.settings[a], y)[0] - spread(data.settings[b], y)[0]) * (lower ? 1 : -1));
  const own = chosen.setting === null ? null : data.settings[chosen.setting]?.twin;
  dense = dense.filter((i, rank) => rank < 2 || i === own);
  const at = (i) => spread(data.settings[i], y)[0];
  return {
    shapes: dense.map((i) => ({ type: 'line', xref: 'paper', x0: 0, x1: 1, y0: at(i), y1: at(i), line: { color: css('--ink'), width: 1, dash: 'dash' }, opacity: 0.7 })),
    annotations: dense.map((i) => ({ xref: 'paper', x: 0, y: at(i), xanchor: 'left', yanchor: 'bottom', showarrow: false, font: { size: 12, color: css('--soft') },
      text: plain(wide.matches ? clip(dense.length > 1 ? data.settings[i].label : 'dense', 60) : 'dense') + ` ${number(at(i), 3)}` })),
  };
}
const clip = (text, n) => (text.length > n ? `${text.slice(0, n - 1)}…` : text);

function drawCard() {
  const card = byId('card');
  card.replaceChildren();
  const s = data.settings[chosen.setting];
  if (!s) return card.append(element('p', 'No setting has this metric.', { class: 'none' }));
  const y = metric().name, axis = frontPlaces().includes(chosen.setting);
  const seeds = s.runs.map((r) => data.runs[r].seed).join(', ');
  card.append(element('h3', s.evaluation ? `${s.mechanism}, evaluated` : s.mechanism));
  card.append(element('p', `${axis ? '★ on the front' : 'off the front'} · ${s.runs.length} run${s.runs.length > 1 ? 's' : ''}, seed${s.runs.length > 1 ? 's' : ''} ${seeds}`, { class: 'where' }));
  const facts = [[short(y), written(spread(s, y))], ['kept', written(spread(s, beside(y, 'kept')))], ['compute (MACs)', written(spread(s, beside(y, 'compute')))],
    ['wall clock, training', spread(s, 'train/seconds') ? `${written(spread(s, 'train/seconds'))} s` : '–']];
  const twin = data.settings[s.twin];
  if (twin && spread(twin, y)) {
    const gap = spread(s, y)[0] - spread(twin, y)[0];
    facts.push(['its dense twin', written(spread(twin, y))], ['difference to it', (gap > 0 ? '+' : '−') + number(Math.abs(gap))]);
  }
  card.append(element('dl', facts.flatMap(([k, v]) => [element('dt', k), element('dd', v)])));
  s.runs.slice(0, 5).forEach((place) => card.append(...runActions(place)));
  if (s.runs.length > 5) card.append(element('p', `and ${s.runs.length - 5} more runs, in the table below`, { class: 'note' }));
  const keys = task().keys.map(([key, common], i) => [key, s.values[i], s.values[i] !== null && s.values[i] !== common]).filter(([, v]) => v !== null);
  if (keys.length) {
    keys.sort((a, b) => b[2] - a[2]);
    card.append(element('h4', 'Differs in'));
    card.append(element('dl', keys.flatMap(([key, v, odd]) => [element('dt', key), element('dd', element('span', v, odd ? { class: 'odd' } : {}))])));
  }
}

function runActions(place) {
  const run = data.runs[place];
  const code = element('code', run.command || 'its command is not known');
  const buttons = [];
  if (run.command) buttons.push(element('button', 'Copy', { type: 'button', onclick: (event) => copy(event.target, code) }));
  if (data.details[place]) buttons.push(element('button', 'Show heads and curves', { type: 'button', onclick: () => chooseRun(place, true) }));
  return [element('h4', run.name), element('div', [code], { class: 'command' }), element('div', buttons, { class: 'actions' })];
}

async function copy(button, code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = 'Copied';
  } catch {
    getSelection().selectAllChildren(code);
    button.textContent = 'Selected';
  }
  setTimeout(() => { button.textContent = 'Copy'; }, 1500);
}

function drawFrontTable(front, x, y) {
  const head = ['Setting', 'Runs', short(y), 'Kept', 'Compute (MACs)', 'Wall clock, s'];
  byId('front-table').tHead.replaceChildren(element('tr', head.map((h, i) => element('th', h, { scope: 'col', class: i ? null : 'words' }))));
  byId('front-table').tBodies[0].replaceChildren(...front.slice(0, 50).map((i) => {
    const s = data.settings[i];
    const link = element('button', s.label, { type: 'button', onclick: () => { look(i); byId('card').scrollIntoView({ block: 'nearest' }); } });
    const cells = [String(s.runs.length), ...[y, beside(y, 'kept'), beside(y, 'compute'), 'train/seconds'].map((k) => written(spread(s, k)))];
    return element('tr', [element('td', link, { class: 'wrap' }), ...cells.map((c) => element('td', c))]);
  }));
}

function look(i) {
  if (i === chosen.setting || i === undefined) return;
  chosen.setting = i;
  drawCard();
}

function hoverSetting(i) {
  const plot = byId('front-plot');
  plot.data.forEach((trace, curveNumber) => {
    const pointNumber = (trace.customdata || []).indexOf(i);
    if (pointNumber >= 0) Plotly.Fx.hover(plot, [{ curveNumber, pointNumber }]);
  });
  look(i);
}

function wireFront() {
  const plot = byId('front-plot');
  plot.on('plotly_hover', (event) => look(event.points[0].customdata));
  plot.on('plotly_click', (event) => {
    look(event.points[0].customdata);
    const place = data.settings[event.points[0].customdata].runs.find((r) => data.details[r]);
    if (place !== undefined) chooseRun(place, false);
  });
  plot.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step && order.length) {
      event.preventDefault();
      const next = order.indexOf(chosen.setting) + step;
      hoverSetting(order[Math.max(0, Math.min(order.length - 1, next))]);
    } else if (event.key === 'Enter' && chosen.setting !== null) {
      const place = data.settings[chosen.setting].runs.find((r) => data.details[r]);
      if (place !== undefined) chooseRun(place, true);
    }
  });
}
