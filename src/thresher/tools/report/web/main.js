// The controls, and what each of them redraws.
function fill(select, names, at) {
  select.replaceChildren(...names.map((name, i) => element('option', name, { value: String(i) })));
  select.value = String(at);
}

function drawAll() {
  drawFront();
  whenNear('run', drawRun);
  if (data.maps.length) whenNear('maps', drawMaps);
  whenNear('clock', drawClock);
  whenNear('runs', drawTable);
}

function chooseMetric(i) {
  chosen.metric = i;
  sorted = { key: 'metric', down: !metric().lower };
}

function chooseTask(i) {
  chosen.task = i;
  chosen.setting = null;
  chooseMetric(0);
  fill(byId('metric'), task().metrics.map((m) => short(m.name)), 0);
  chosen.run = firstRun();
  if (chosen.run !== null) byId('chosen').value = String(chosen.run);
  limit = 100;
  drawAll();
}

if (data.settings.length && data.tasks.some((t) => t.metrics.length)) {
  show('controls', true);
  show('task-label', data.tasks.length > 1);
  fill(byId('task'), data.tasks.map((t) => t.name), 0);
  fillRuns();
  if (data.maps.length) fillMaps();
  chooseTask(0);
  wireFront();
  byId('task').addEventListener('change', (event) => chooseTask(Number(event.target.value)));
  byId('metric').addEventListener('change', (event) => { chooseMetric(Number(event.target.value)); drawAll(); });
  byId('axis').addEventListener('change', (event) => { chosen.axis = event.target.value; drawFront(); whenNear('runs', drawTable); });
  byId('filter').addEventListener('input', () => { limit = 100; drawTable(); });
  byId('more').addEventListener('click', () => { limit += 100; drawTable(); });
  dark.addEventListener('change', drawAll);
  wide.addEventListener('change', drawAll);
}
document.documentElement.dataset.ready = 'yes';
