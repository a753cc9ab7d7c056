// Samples: every token with its position and whether it is trained, beside the pictures as the model sees them.

function legend() {
  const key = (kind, name, meaning) => h('span', null, h('span', { class: `token ${kind}` }, name), ` ${meaning}`);
  return h('p', { class: 'legend' },
    key('trained', 'trained', 'the model learns to write it'),
    key('prompt', 'not trained', 'it only reads it'),
    key('visual', 'visual', 'filled by the vision tower'),
    key('special', 'special', 'written by the chat template'));
}

function positionText(sample, place) {
  return `(${sample.positions.map((axis) => axis[place]).join(', ')})`;
}

function tokenTip(sample, place) {
  const weight = sample.weights[place];
  return [
    `token ${count(place)}, id ${sample.ids[place]}`,
    `position (t, h, w) = ${positionText(sample, place)}`,
    weight ? `trained, weight ${count(weight, 4)}` : 'not trained',
    !sample.texts[place] && 'goes on with the character before it',
  ].filter(Boolean);
}

function slotTip(sample, place, length) {
  const last = place + length - 1;
  return [
    `tokens ${count(place)} to ${count(last)}, id ${sample.ids[place]}`,
    `positions (t, h, w) from ${positionText(sample, place)} to ${positionText(sample, last)}`,
    'not trained; the picture tells of each',
  ];
}

function tokenSpans(sample) {
  const special = new Set(sample.special);
  const visual = new Map(sample.visual);
  const spans = [];
  let weightBefore = 0;
  for (let place = 0; place < sample.ids.length; place += 1) {
    const slot = visual.get(place);
    if (slot) {
      spans.push(h('span', { class: 'token visual', 'data-place': place }, `▦ ${plural(slot, 'visual token')}`));
      place += slot - 1;
      weightBefore = 0;
      continue;
    }
    const weight = sample.weights[place];
    const kind = `${weight ? 'trained' : 'prompt'}${special.has(place) ? ' special' : ''}`;
    const mark = weight && weight !== 1 && weight !== weightBefore ? `×${count(weight, 4)}` : null;
    const text = sample.texts[place].replaceAll('\n', '⏎\n').replaceAll('\t', '⇥\t');
    spans.push(h('span', { class: `token ${kind}`, 'data-place': place, 'data-weight': mark }, text || '·'));
    weightBefore = weight;
  }
  return spans;
}

function tokenView(sample) {
  const view = h('div', { class: 'tokens', tabindex: 0, role: 'group', 'aria-label': 'Tokens; arrow keys step through them' }, tokenSpans(sample));
  const visual = new Map(sample.visual);
  const tell = (span) => {
    const area = span.getBoundingClientRect();
    const place = Number(span.dataset.place);
    const length = visual.get(place);
    showTip(length > 1 ? slotTip(sample, place, length) : tokenTip(sample, place), area.left, area.bottom - 14);
  };
  view.addEventListener('pointerover', (event) => {
    const span = event.target.closest('.token');
    if (span) tell(span);
  });
  view.addEventListener('pointerleave', hideTip);
  let current = -1;
  const step = (to) => {
    const spans = view.children;
    if (current >= 0) spans[current].classList.remove('current');
    current = Math.min(spans.length - 1, Math.max(0, to));
    spans[current].classList.add('current');
    spans[current].scrollIntoView({ block: 'nearest' });
    tell(spans[current]);
  };
  view.addEventListener('keydown', (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    step(current + move);
  });
  view.addEventListener('blur', () => {
    if (current >= 0) view.children[current].classList.remove('current');
    current = -1;
    hideTip();
  });
  return view;
}

function sampleBody(sample) {
  if (sample.fault) return [h('p', { class: 'fault' }, `Breaks when it is decoded: ${sample.fault}`)];
  const undrawn = sample.marks.filter((mark) => mark.medium === null).length;
  const which = plural(undrawn, 'box or point is', 'boxes or points are');
  return [
    sample.frames.length > 0 && h('div', { class: 'pictures', tabindex: 0 }, sample.frames.map((frame) => picture(sample, frame))),
    undrawn > 0 && h('p', { class: 'evidence' }, `${which} not drawn: the row does not say of which picture, or the numbers cannot be thousandths.`),
    tokenView(sample)];
}

// badge: called with a kind of warning.
function sampleCard(sample, badge) {
  const sum = (list) => list.reduce((all, one) => all + one, 0);
  const facts = sample.fault ? 'breaks when it is decoded'
    : `${plural(sample.ids.length, 'token')} · ${count(sum(sample.visual.map(([, length]) => length)))} visual · ${count(sample.weights.filter((weight) => weight > 0).length)} trained`;
  const body = h('div', { class: 'body' });
  const card = h('details', { class: 'sample', 'data-id': sample.id, 'data-source': sample.source },
    h('summary', null,
      !sample.fault && sample.frames.length > 0 && h('img', { class: 'thumb', src: sample.frames[0].src, alt: '', loading: 'lazy', decoding: 'async' }),
      h('span', { class: 'name' }, sample.id),
      h('span', { class: 'evidence' }, facts),
      sample.kinds.map(badge)),
    body);
  // A thousand tokens are a thousand elements, so they are made when the card is first opened.
  card.addEventListener('toggle', () => {
    if (card.open && !body.childElementCount) fill(body, sampleBody(sample));
  });
  return card;
}

// A kind that too few rows show to be a warning is a note. kinds: what each means.
function renderSamples(samples, hazards, kinds) {
  const level = (sample, kind) => (hazards.find((hazard) => hazard.kind === kind && hazard.source === sample.source) || { level: 'note' }).level;
  const badge = (sample, kind) => h('span', { class: `badge ${level(sample, kind)}`, title: kinds[kind] }, kind);
  const cards = samples.map((sample) => ({
    source: sample.source,
    kinds: sample.kinds,
    text: `${sample.id}\n${sample.fault || sample.texts.filter((text) => text !== '<|image_pad|>' && text !== '<|video_pad|>').join('')}`.toLowerCase(),
    element: sampleCard(sample, (kind) => badge(sample, kind)),
  }));
  fill(at('samples'),
    h('h2', { id: 'samples-title' }, 'Samples as the model sees them'), legend(),
    h('p', { id: 'overlays' }),
    cards.map((card) => card.element),
    h('p', { id: 'none', hidden: true }, 'No sample matches.'));
  if (cards.length) cards[0].element.open = true;
  return cards;
}
