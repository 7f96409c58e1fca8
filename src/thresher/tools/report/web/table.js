// All runs in a table that sorts and filters, and wall clock beside compute.
let sorted = { key: 'metric', down: true };
let limit = 100;

function columns() {
  const y = metric().name;
  const text = (label, get) => ({ label, get, key: label, text: true });
  return [
    { ...text('Run', (run) => run.name), key: 'run' },
    { label: 'Seed', key: 'seed', get: (run) => run.seed },
    { ...text('Attention', (run, s) => s.mechanism + (s.evaluation ? ', evaluated' : '')), key: 'attention' },
    { label: short(y), key: 'metric', get: (run) => value(run, y) },
    { label: 'Kept', key: 'kept', get: (run) => value(run, beside(y, 'kept')) },
    { label: 'Compute (MACs)', key: 'compute', get: (run) => value(run, beside(y, 'compute')) },
    { label: 'Wall clock, s', key: 'seconds', get: (run) => value(run, 'train/seconds') },
    ...task().keys.map(([key, common], i) => ({ ...text(key, (run, s) => s.values[i]), common })).filter((c) => c.label !== 'attention'),
  ];
}

function compare(a, b) {
  const empty = (v) => v === null || v === undefined;
  if (empty(a) || empty(b)) return empty(a) - empty(b);
  if (typeof a === 'number' && typeof b === 'number') return a - b;
  return String(a).localeCompare(String(b), 'en', { numeric: true });
}

function drawTable() {
  const shown = columns();
  const by = shown.find((c) => c.key === sorted.key) ?? shown[3];
  const words = byId('filter').value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = data.runs.map((run, place) => ({ run, place, s: data.settings[run.setting] })).filter(({ run, s }) => {
    if (!s || s.task !== chosen.task) return false;
    const text = `${run.name} ${s.label} ${run.command}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const entries = found.map((entry) => ({ ...entry, at: by.get(entry.run, entry.s) }));
  const empty = (v) => v === null || v === undefined;
  entries.sort((a, b) => (empty(a.at) || empty(b.at) ? compare(a.at, b.at) : compare(a.at, b.at) * (sorted.down ? -1 : 1)));
  byId('run-table').tHead.replaceChildren(element('tr', shown.map((column) => heading(column))));
  const on = new Set(frontPlaces());
  byId('run-table').tBodies[0].replaceChildren(...entries.slice(0, limit).map(({ run, place, s }) => element('tr', shown.map((column) => cell(column, run, s, place, on.has(run.setting))))));
  byId('shown').textContent = `${Math.min(limit, entries.length).toLocaleString('en')} of ${entries.length.toLocaleString('en')} runs.`;
  show('more', entries.length > limit);
}

function heading(column) {
  const sort = column.key === sorted.key ? (sorted.down ? 'descending' : 'ascending') : null;
  const button = element('button', column.label, { type: 'button', onclick: () => {
    sorted = { key: column.key, down: column.key === sorted.key ? !sorted.down : !column.text };
    drawTable();
    [...byId('run-table').tHead.querySelectorAll('button')].find((b) => b.textContent === column.label)?.focus();
  } });
  return element('th', button, { scope: 'col', 'aria-sort': sort, class: column.text ? 'words' : null });
}

function cell(column, run, s, place, onFront) {
  const v = column.get(run, s);
  if (column.key === 'run') {
    const star = onFront ? element('span', '★ ', { class: 'star', title: 'its setting is on the front' }) : '';
    return element('td', [star, element('button', run.name, { type: 'button', title: run.command || null, onclick: () => openRun(place) })], { class: 'words' });
  }
  const shownValue = typeof v === 'number' ? (column.key === 'seed' ? String(v) : column.key === 'seconds' ? number(v, 1) : number(v)) : (v ?? '');
  const odd = column.common !== undefined && v !== null && v !== column.common;
  return element('td', odd ? element('span', shownValue, { class: 'odd' }) : shownValue, { class: column.text ? 'words' : null });
}

function openRun(place) {
  look(data.runs[place].setting);
  if (data.details[place]) chooseRun(place, true);
  else byId('front').scrollIntoView();
}

function drawClock() {
  const y = metric().name, x = beside(y, 'compute');
  const known = data.settings.map((s, i) => i).filter((i) => data.settings[i].task === chosen.task && spread(data.settings[i], x) && spread(data.settings[i], 'train/seconds'));
  byId('clock-plot').classList.toggle('absent', !known.length);
  const step = Math.max(1, known.length / MOST);
  const drawn = Array.from({ length: Math.min(known.length, MOST) }, (_, i) => known[Math.floor(i * step)]);
  const traces = mechanisms.map((name) => [name, drawn.filter((i) => data.settings[i].mechanism === name)]).filter(([, own]) => own.length).map(([name, own]) => ({
    x: own.map((i) => spread(data.settings[i], x)[0]), y: own.map((i) => spread(data.settings[i], 'train/seconds')[0]), customdata: own, mode: 'markers', name: plain(name),
    marker: { symbol: symbol(name), size: 10, color: tint(name), line: { width: 1, color: css('--panel') } },
    text: own.map((i) => plain(clip(data.settings[i].label, 80))), hovertemplate: '%{text}<br>compute %{x:.3f}<br>%{y:,.0f} s of training<extra></extra>',
  }));
  draw('clock-plot', traces, { xaxis: { title: { text: 'compute: attention MACs ÷ dense' }, rangemode: 'tozero' }, yaxis: { title: { text: 'training, seconds' }, rangemode: 'tozero' } });
}
