// Samples: every token with its position and whether it is trained, beside the images as the model sees them.

function legend() {
  const key = (kind, name, meaning) => h('span', null, h('span', { class: `token ${kind}` }, name), ` ${meaning}`);
  return h('p', { class: 'legend' },
    key('trained', 'trained', 'the model learns to write it'),
    key('prompt', 'not trained', 'it only reads it'),
    key('visual', 'visual', 'filled by the vision tower'),
    key('special', 'special', 'written by the chat template'));
}

function positionText(sample, position) {
  return `(${sample.positions.map((axis) => axis[position]).join(', ')})`;
}

function tokenTip(sample, position) {
  const weight = sample.weights[position];
  return [
    `token ${count(position)}, id ${sample.ids[position]}`,
    `position (t, h, w) = ${positionText(sample, position)}`,
    weight ? `trained, weight ${count(weight, 4)}` : 'not trained',
    !sample.texts[position] && 'continues the character before it',
  ].filter(Boolean);
}

function slotTip(sample, position, length) {
  const last = position + length - 1;
  return [
    `tokens ${count(position)} to ${count(last)}, id ${sample.ids[position]}`,
    `positions (t, h, w) from ${positionText(sample, position)} to ${positionText(sample, last)}`,
    'not trained; point at the image for each',
  ];
}

function tokenSpans(sample) {
  const special = new Set(sample.special);
  const visual = new Map(sample.visual);
  const spans = [];
  let weightBefore = 0;
  for (let position = 0; position < sample.ids.length; position += 1) {
    const slot = visual.get(position);
    if (slot) {
      spans.push(h('span', { class: 'token visual', 'data-position': position }, `▦ ${plural(slot, 'visual token')}`));
      position += slot - 1;
      weightBefore = 0;
      continue;
    }
    const weight = sample.weights[position];
    const kind = `${weight ? 'trained' : 'prompt'}${special.has(position) ? ' special' : ''}`;
    const mark = weight && weight !== 1 && weight !== weightBefore ? `×${count(weight, 4)}` : null;
    const text = sample.texts[position].replaceAll('\n', '⏎\n').replaceAll('\t', '⇥\t');
    spans.push(h('span', { class: `token ${kind}`, 'data-position': position, 'data-weight': mark }, text || '·'));
    weightBefore = weight;
  }
  return spans;
}

function tokenView(sample) {
  const view = h('div', { class: 'tokens', tabindex: 0, role: 'group', 'aria-label': 'Tokens; arrow keys step through them' }, tokenSpans(sample));
  const visual = new Map(sample.visual);
  const tell = (span) => {
    const area = span.getBoundingClientRect();
    const position = Number(span.dataset.position);
    const length = visual.get(position);
    showTip(length > 1 ? slotTip(sample, position, length) : tokenTip(sample, position), area.left, area.bottom - 14);
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
    sample.frames.length > 0 && h('div', { class: 'images', tabindex: 0 }, sample.frames.map((frame) => image(sample, frame))),
    undrawn > 0 && h('p', { class: 'evidence' }, `${which} not drawn: the row does not say of which image, or the numbers cannot be thousandths.`),
    tokenView(sample)];
}

// badge: called with a check.
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
      sample.checks.map(badge)),
    body);
  // A thousand tokens are a thousand elements, so they are made when the card is first opened.
  card.addEventListener('toggle', () => {
    if (card.open && !body.childElementCount) fill(body, sampleBody(sample));
  });
  return card;
}

// A check that too few rows fail to be a warning is a note. checks: what each means.
function renderSamples(samples, findings, checks) {
  const level = (sample, check) => (findings.find((finding) => finding.kind === check && finding.source === sample.source) || { level: 'note' }).level;
  const badge = (sample, check) => h('span', { class: `badge ${level(sample, check)}`, title: checks[check] }, check);
  const cards = samples.map((sample) => ({
    source: sample.source,
    checks: sample.checks,
    text: `${sample.id}\n${sample.fault || sample.texts.filter((text) => text !== '<|image_pad|>' && text !== '<|video_pad|>').join('')}`.toLowerCase(),
    element: sampleCard(sample, (check) => badge(sample, check)),
  }));
  fill(at('samples'),
    h('h2', { id: 'samples-title' }, 'Samples as the model sees them'), legend(),
    h('p', { id: 'overlays' }),
    cards.map((card) => card.element),
    h('p', { id: 'none', hidden: true }, 'No sample matches.'));
  if (cards.length) cards[0].element.open = true;
  return cards;
}
