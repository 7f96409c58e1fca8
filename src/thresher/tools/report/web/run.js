// One chosen run: what each head keeps, its thresholds, and the training over time.
function fillRuns() {
  const select = byId('chosen');
  const places = Object.keys(data.details).map(Number);
  const groups = data.tasks.map((t, i) => [t.name, places.filter((p) => data.settings[data.runs[p].setting]?.task === i)]);
  groups.push(['without results', places.filter((p) => data.runs[p].setting === null)]);
  const options = (list) => list.map((p) => element('option', data.runs[p].name, { value: String(p) }));
  const full = groups.filter(([, list]) => list.length);
  select.replaceChildren(...(full.length > 1 ? full.map(([label, list]) => element('optgroup', options(list), { label })) : options(full[0]?.[1] ?? [])));
  select.addEventListener('change', () => chooseRun(Number(select.value), false));
}

function firstRun() {
  const candidates = [...frontPlaces(), ...data.settings.keys()].filter((i) => data.settings[i].task === chosen.task);
  const places = candidates.flatMap((i) => data.settings[i].runs).filter((r) => data.details[r]);
  const trained = places.filter((r) => Object.keys(data.details[r].curves).length);
  return trained.find((r) => data.details[r].heads?.threshold) ?? trained[0] ?? places[0] ?? Object.keys(data.details).map(Number)[0] ?? null;
}

function chooseRun(place, scroll) {
  chosen.run = place;
  byId('chosen').value = String(place);
  whenNear('run', drawRun);
  if (scroll) byId('run').scrollIntoView({ behavior: window.matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth' });
}

function drawRun() {
  const details = data.details[chosen.run];
  const run = data.runs[chosen.run];
  const missing = !details ? 'No run of this report has heads or curves.' : !details.heads ? 'This run left no heads.json: it ended before its test.' : '';
  byId('run-missing').textContent = missing;
  show('run-missing', missing !== '');
  show('heat', Boolean(details?.heads));
  show('curves', Boolean(details && Object.keys(details.curves).length));
  byId('run-note').textContent = run ? (data.settings[run.setting]?.label ?? 'without results') : '';
  byId('run-command').textContent = run?.command ?? '';
  show('run-command', Boolean(run?.command));
  const parts = details?.data ?? [];
  byId('run-data').querySelector('tbody').replaceChildren(...parts.map(([name, said]) => element('tr', [element('th', name, { scope: 'row' }), element('td', said, { class: 'words wrap' })])));
  show('run-data', parts.length > 0);
  if (!details) return;
  if (details.heads) drawHeads(details.heads);
  drawCurves(details.curves);
}

function drawHeads(heads) {
  heat('heat-kept', heads.layers, heads.kept, 3);
  show('heat-threshold', heads.threshold !== null);
  show('no-threshold', heads.threshold === null);
  if (heads.threshold) heat('heat-threshold', heads.layers, heads.threshold, 2);
}

function heat(id, layers, rows, digits) {
  const width = Math.max(...rows.map((row) => row.length));
  const full = rows.map((row) => [...row, ...Array(width - row.length).fill(null)]);
  const names = layers.map((layer) => plain(clip(commonEndsRemoved(layer, layers), 24)));
  const largest = Math.max(...full.flat().filter((v) => v !== null), 1e-9);
  byId(id).style.height = `${Math.max(220, 70 + 34 * layers.length)}px`;
  draw(id, [{
    type: 'heatmap', z: full, x: [...Array(width).keys()].map(String), y: names, zmin: 0, zmax: largest, colorscale: 'Cividis', xgap: 2, ygap: 2, hoverongaps: false,
    text: full.map((row) => row.map((v) => (v === null ? '' : v.toFixed(digits)))), texttemplate: width <= (wide.matches ? 12 : 6) ? '%{text}' : '',
    customdata: full.map((row, i) => row.map(() => plain(layers[i]))), hovertemplate: '%{customdata}, head %{x}: %{z:.4f}<extra></extra>',
    colorbar: { thickness: 10, outlinewidth: 0, len: 1, tickfont: { size: 11 } },
  }], { margin: { l: 40, r: 8, t: strip(), b: 40 }, xaxis: { title: { text: 'head' }, type: 'category', showgrid: false }, yaxis: { type: 'category', autorange: 'reversed', showgrid: false, title: { text: '' } } });
}

function commonEndsRemoved(name, names) {
  if (names.length < 2) return name;
  const parts = names.map((n) => n.split('.'));
  let front = 0, back = 0;
  const shortest = Math.min(...parts.map((p) => p.length)) - 1;
  while (front < shortest && parts.every((p) => p[front] === parts[0][front])) front += 1;
  while (back < shortest - front && parts.every((p) => p[p.length - 1 - back] === parts[0][parts[0].length - 1 - back])) back += 1;
  const own = name.split('.');
  return own.slice(Math.max(0, front - 1), own.length - back).join('.') || name;
}

function line(curve, name, i, dash, extra = {}) {
  return { x: curve[0], y: curve[1], name: plain(name), mode: curve[0].length > 12 ? 'lines' : 'lines+markers', marker: { symbol: SYMBOLS[i % SYMBOLS.length], size: 6 }, line: { color: colour(i), dash, width: 2 }, ...extra };
}

function drawCurves(curves) {
  const listed = (wanted) => wanted.filter(([key]) => curves[key]).map(([key, name, i, dash]) => line(curves[key], name, i, dash));
  const time = { title: { text: 'step' }, rangemode: 'tozero' };
  const kept = listed([['train/kept', 'kept, training', 0, 'solid'], ['val/kept', 'kept, validation', 1, 'dot'], ['train/compute', 'compute, training', 2, 'dash'], ['train/aim', 'budget', 6, 'dashdot']]);
  draw('curve-kept', kept, { xaxis: time, yaxis: { rangemode: 'tozero' } });

  const names = Object.keys(curves).filter((key) => key.startsWith('heads/'));
  show('curve-threshold', names.length > 0);
  show('no-curve-threshold', names.length === 0);
  if (names.length) drawThresholds(names, curves, time);

  const named = metric().name.split('/')[1];
  const own = curves[`train/${named}`] || curves[`val/${named}`] ? named : 'error'; // what a tuning lowers
  const quality = listed([[`train/${own}`, `${own}, training batches`, 5, 'solid'], [`val/${own}`, `${own}, validation`, 0, 'solid']]);
  byId('curve-metric-title').textContent = `${own} over training`;
  draw('curve-metric', quality, { xaxis: time, yaxis: spanOf(quality) });
}

function drawThresholds(names, curves, time) {
  const layerOf = (name) => name.slice(6, name.lastIndexOf('.'));
  const layers = [...new Set(names.map(layerOf))].sort((a, b) => a.localeCompare(b, 'en', { numeric: true }));
  const traces = names.map((name) => {
    const layer = layerOf(name), i = layers.indexOf(layer), head = Number(name.slice(name.lastIndexOf('.') + 1).split('/')[0]);
    const first = names.find((n) => layerOf(n) === layer) === name;
    return line(curves[name], commonEndsRemoved(layer, layers), i, DASHES[head % DASHES.length], { legendgroup: layer, showlegend: first && layers.length <= 12, hovertemplate: `${plain(layer)}, head ${head}: %{y:.3f}<extra></extra>` });
  });
  draw('curve-threshold', traces, { xaxis: time, yaxis: { rangemode: 'tozero' } });
}
