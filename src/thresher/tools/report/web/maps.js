// Attention maps of an example: which keys a query of a head kept and how it weighed them, raw and effective.
const ORANGE = [213, 94, 0];
const looked = { map: 0, layer: 0, head: 0, query: 0 };
const map = () => data.maps[looked.map];
const layer = () => map().layers[looked.layer];

function fromBase64(text, Kind) {
  return new Kind(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

// Arrays are decoded when they are first looked at.
function entries(l, kind) {
  l[kind].array ??= fromBase64(l[kind].bytes, Int8Array);
  return l[kind].array;
}

function row(l, kind, head, query) {
  const [, n, m] = l.shape, start = (head * n + query) * m, largest = l[kind].largest[head * n + query];
  const part = entries(l, kind).subarray(start, start + m);
  return { shares: Array.from(part, (q) => Math.sign(q) * (q / 127) ** 2), largest, bytes: part };
}

const hex = (name) => css(name).match(/[0-9a-f]{2}/gi).map((x) => parseInt(x, 16));
const rgba = ([r, g, b], alpha) => `rgba(${r}, ${g}, ${b}, ${alpha})`;
const strength = (share) => Math.sqrt(Math.abs(share));

function fillMaps() {
  fill(byId('map-example'), data.maps.map((m) => `${data.runs[m.run].name} · example ${m.example}${m.label === null ? '' : ` · ${m.label}`}`), 0);
  byId('map-example').addEventListener('change', (event) => chooseMap(Number(event.target.value)));
  byId('map-layer').addEventListener('change', (event) => { looked.layer = Number(event.target.value); chooseHead(0); });
  byId('map-head').addEventListener('change', (event) => chooseHead(Number(event.target.value)));
  byId('map-query').addEventListener('input', (event) => { if (event.target.value !== '') chooseQuery(Number(event.target.value)); });
  byId('map-grid').addEventListener('keydown', walkHeads);
  for (const id of ['map-weights', 'map-effective']) byId(id).addEventListener('keydown', walkQueries);
  chooseMap(0);
}

function chooseMap(i) {
  Object.assign(looked, { map: i, layer: 0, head: 0 });
  byId('map-example').value = String(i);
  fill(byId('map-layer'), map().layers.map((l) => l.name), 0);
  looked.query = Math.floor(layer().shape[1] / 2);
  chooseHead(0);
}

function chooseHead(head) {
  looked.head = head;
  byId('map-layer').value = String(looked.layer);
  fill(byId('map-head'), layer().heads.map((_, i) => String(i)), head);
  chooseQuery(looked.query);
}

function chooseQuery(query) {
  looked.query = Math.max(0, Math.min(layer().shape[1] - 1, Math.round(query)));
  const input = byId('map-query');
  input.max = String(layer().shape[1] - 1);
  if (Number(input.value) !== looked.query || input.value === '') input.value = String(looked.query);
  whenNear('maps', drawMaps);
}

// The name of a token of a layer: a patch by row and column, a text token by what it stands for.
function tokenName(side, position) {
  if (!side) return `token ${position}`;
  if (position < side.extra) return side.extra === 1 ? 'class token' : `extra token ${position}`;
  const at = position - side.extra;
  if (map().grid) return `patch (${Math.floor(at / map().grid[1])}, ${at % map().grid[1]})`;
  return `“${visibleText(map().texts[side.input][at])}”`;
}
const visibleText = (text) => text.replace(/\n/g, '⏎').replace(/\t/g, '⇥').replace(/ /g, '␣');

function drawMaps() {
  const m = map(), l = layer(), head = l.heads[looked.head];
  const classes = m.label === null ? '' : `${m.label}${m.predicted === m.label ? ', recognised' : `, taken for ${m.predicted}`} · `;
  byId('map-note').textContent = `${classes}${l.attention}, ${l.pattern.replace('_', ' ')}, ${l.shape[1]} queries, ${l.shape[2]} keys`;
  const percent = (x) => `${(100 * x).toFixed(x < 0.1 ? 1 : 0)} %`;
  byId('map-facts').replaceChildren(...[
    ['kept', number(head.kept, 3)], ['threshold', head.threshold === null ? 'none' : number(head.threshold, 3)],
    ['cannot reach the output', `${percent(head.ineffective)} of the map’s norm`], ['rank of the values', `${head.rank} for ${l.shape[2]} keys`],
  ].map(([k, v]) => element('div', [element('dt', k), element('dd', v)])));
  show('map-sampled', l.sampled_values);
  const raw = row(l, 'weights', looked.head, looked.query), kept = raw.bytes.reduce((sum, q) => sum + (q !== 0), 0);
  const best = raw.shares.map((s, i) => [s * raw.largest, i]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([w]) => w > 0);
  byId('map-query-name').textContent = `Query ${looked.query}, ${tokenName(l.queries, looked.query)}${around(l.queries)}, kept ${kept} of ${l.shape[2]} keys; most weight: ${best.map(([w, i]) => `${tokenName(l.keys, i)}: ${w.toFixed(2)}`).join('; ') || 'none'}.`;
  for (const kind of ['weights', 'effective']) {
    const view = m.picture && m.grid && l.keys ? pictureView(kind) : l.keys && !m.grid ? textView(kind) : null;
    byId(`map-${kind}`).replaceChildren(...[view, matrixView(kind)].filter(Boolean));
  }
  drawGrid();
}

function around(side) {
  if (!side || map().grid) return '';
  const text = map().texts[side.input], at = looked.query - side.extra;
  return ` in “${visibleText(`${text.slice(Math.max(0, at - 12), at).join('')}▸${text[at]}◂${text.slice(at + 1, at + 13).join('')}`)}”`;
}

// Pictures: what was kept shows, tinted by its weight; what was dropped fades into the page.
function drawPicture(canvas, kind, l, head, cell) {
  const m = map(), [rows, columns] = m.grid, extra = l.keys.extra, top = extra ? cell + 4 : 0;
  canvas.width = columns * cell;
  canvas.height = rows * cell + top;
  const context = canvas.getContext('2d');
  context.imageSmoothingEnabled = false;
  context.fillStyle = css('--panel');
  context.fillRect(0, top, columns * cell, rows * cell);
  context.globalAlpha = 0.6; // pale, so that tints show on dark parts too
  context.drawImage(pictureCanvas(m), 0, top, columns * cell, rows * cell);
  context.globalAlpha = 1;
  const { shares, bytes } = row(l, kind, head, Math.min(looked.query, l.shape[1] - 1)), plus = hex('--accent'), page = hex('--panel');
  const place = (i) => (i < extra ? [i * cell, 0] : [((i - extra) % columns) * cell, top + Math.floor((i - extra) / columns) * cell]);
  shares.forEach((share, i) => {
    const [x, y] = place(i), dropped = kind === 'weights' && bytes[i] === 0;
    if (i < extra) { context.fillStyle = css('--code'); context.fillRect(x, y, cell, cell); }
    context.fillStyle = dropped ? rgba(page, 0.86) : rgba(share < 0 ? ORANGE : plus, 0.75 * strength(share));
    context.fillRect(x, y, cell, cell);
  });
  if (JSON.stringify(l.queries) === JSON.stringify(l.keys)) {
    const [x, y] = place(looked.query), line = Math.max(1, cell / 12);
    context.lineWidth = line;
    context.strokeStyle = css('--ink');
    context.strokeRect(x + line / 2, y + line / 2, cell - line, cell - line);
  }
}

function pictureCanvas(m) {
  if (!m.canvas) {
    const rgb = fromBase64(m.picture.rgb, Uint8Array);
    m.canvas = element('canvas', []);
    m.canvas.width = m.picture.width;
    m.canvas.height = m.picture.height;
    const context = m.canvas.getContext('2d'), image = context.createImageData(m.picture.width, m.picture.height);
    for (let i = 0; i < rgb.length / 3; i += 1) image.data.set([rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2], 255], 4 * i);
    context.putImageData(image, 0, 0);
  }
  return m.canvas;
}

function pictureView(kind) {
  const l = layer(), [, columns] = map().grid, cell = Math.max(6, Math.round(336 / columns));
  const canvas = element('canvas', [], { class: 'picture', role: 'img', 'aria-label': `the picture, ${kind === 'weights' ? 'kept patches tinted by their weight' : 'patches tinted by effective attention'}` });
  drawPicture(canvas, kind, l, looked.head, cell);
  canvas.addEventListener('click', (event) => {
    const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width, top = l.keys.extra ? cell + 4 : 0;
    const x = Math.floor(((event.clientX - box.left) * scale) / cell), y = (event.clientY - box.top) * scale;
    chooseQuery(y < top ? Math.min(x, l.keys.extra - 1) : l.keys.extra + Math.floor((y - top) / cell) * columns + x);
  });
  return canvas;
}

function textView(kind) {
  const l = layer(), self = JSON.stringify(l.queries) === JSON.stringify(l.keys), { shares, bytes } = row(l, kind, looked.head, looked.query), plus = hex('--accent');
  const single = map().texts[l.keys.input].every((token) => token.length === 1 || token.startsWith('['));
  return element('div', map().texts[l.keys.input].map((token, i) => {
    const mark = element('span', token === '\n' ? '⏎\n' : token, { 'data-at': String(i), class: `${bytes[i] !== 0 ? 'on' : 'off'}${self && i === looked.query ? ' query' : ''}` });
    if (bytes[i] !== 0) mark.style.backgroundColor = rgba(shares[i] < 0 ? ORANGE : plus, 0.65 * strength(shares[i]));
    return mark;
  }), { class: `text${single ? '' : ' apart'}${kind === 'weights' ? ' raw' : ''}`, onclick: (event) => { if (self && event.target.dataset.at) chooseQuery(Number(event.target.dataset.at)); } });
}

// The whole map, a row for each query.
function drawMatrix(canvas, kind, l, head, scale, mark) {
  const [, n, m] = l.shape, all = entries(l, kind), page = hex('--code'), plus = hex('--accent');
  const small = element('canvas', []);
  small.width = m;
  small.height = n;
  const context = small.getContext('2d'), image = context.createImageData(m, n);
  for (let i = 0; i < n * m; i += 1) {
    const q = all[head * n * m + i], alpha = q === 0 ? 0 : 0.12 + 0.88 * Math.abs(q) / 127, to = q < 0 ? ORANGE : plus;
    for (let c = 0; c < 3; c += 1) image.data[4 * i + c] = page[c] + (to[c] - page[c]) * alpha;
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  canvas.width = m * scale;
  canvas.height = n * scale;
  const target = canvas.getContext('2d');
  target.imageSmoothingEnabled = false;
  target.drawImage(small, 0, 0, canvas.width, canvas.height);
  if (mark) {
    target.strokeStyle = css('--ink');
    target.strokeRect(0.5, looked.query * scale + 0.5, canvas.width - 1, Math.max(scale - 1, 1));
  }
}

function matrixView(kind) {
  const l = layer(), scale = Math.max(1, Math.floor(336 / l.shape[2]));
  const canvas = element('canvas', [], { class: 'matrix', role: 'img', 'aria-label': 'the whole map: rows are queries, columns are keys' });
  drawMatrix(canvas, kind, l, looked.head, scale, true);
  canvas.addEventListener('click', (event) => {
    const box = canvas.getBoundingClientRect();
    chooseQuery(Math.floor(((event.clientY - box.top) / box.height) * l.shape[1]));
  });
  return canvas;
}

// All heads at once, layers down.
function drawGrid() {
  const m = map(), names = m.layers.map((l) => l.name), pictures = m.picture && m.grid;
  byId('map-grid-title').textContent = pictures ? 'All heads, for this query: number and kept' : 'All heads, whole maps: number and kept';
  const focused = document.activeElement?.dataset?.head !== undefined && byId('map-grid').contains(document.activeElement);
  byId('map-grid').replaceChildren(...m.layers.map((l, i) => element('div', [
    element('span', commonEndsRemoved(l.name, names), { class: 'layer', title: l.name }),
    ...l.heads.map((head, h) => {
      const on = i === looked.layer && h === looked.head, canvas = element('canvas', []);
      if (pictures && l.keys && looked.query < l.shape[1]) drawPicture(canvas, 'weights', l, h, Math.max(2, Math.round(84 / m.grid[1])));
      else drawMatrix(canvas, 'weights', l, h, 1, false);
      return element('button', [canvas, element('span', `${h} · ${head.kept.toFixed(2)}`)], { type: 'button', 'data-layer': String(i), 'data-head': String(h), 'aria-pressed': String(on), tabindex: on ? '0' : '-1',
        'aria-label': `${l.name}, head ${h}: kept ${head.kept.toFixed(3)}, ${(100 * head.ineffective).toFixed(0)} % cannot reach the output`, onclick: () => { looked.layer = i; chooseHead(h); } });
    }),
  ], { class: 'heads', role: 'group', 'aria-label': l.name })));
  if (focused) byId('map-grid').querySelector('[aria-pressed=true]').focus();
}

function walkHeads(event) {
  const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] ?? [];
  if (down === undefined) return;
  event.preventDefault();
  looked.layer = Math.max(0, Math.min(map().layers.length - 1, looked.layer + down));
  chooseHead(Math.max(0, Math.min(layer().heads.length - 1, looked.head + right)));
}

function walkQueries(event) {
  const columns = map().grid && layer().queries ? map().grid[1] : 1;
  const step = { ArrowDown: columns, ArrowUp: -columns, ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  chooseQuery(looked.query + step);
}
