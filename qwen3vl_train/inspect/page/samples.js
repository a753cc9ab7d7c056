// Samples: pictures as the model sees them, and every token with its position and whether it is trained.

function legend() {
  const key = (kind, name, meaning) => h('span', null, h('span', { class: `token ${kind}` }, name), ` ${meaning}`);
  return h('p', { class: 'legend' },
    key('trained', 'trained', 'the model learns to write it'),
    key('prompt', 'not trained', 'it only reads it'),
    key('visual', 'visual', 'filled by the vision tower'),
    key('special', 'special', 'written by the chat template'));
}

function tokenTip(sample, place) {
  const [t, height, w] = sample.positions.map((row) => row[place]);
  const weight = sample.weights[place];
  return [
    `token ${count(place)}, id ${sample.ids[place]}`,
    `position (t, h, w) = (${t}, ${height}, ${w})`,
    weight ? `trained, weight ${count(weight, 4)}` : 'not trained',
  ];
}

function gridPath(rows, cols) {
  const lines = [];
  for (let row = 1; row < rows; row += 1) lines.push(`M0 ${row}H${cols}`);
  for (let col = 1; col < cols; col += 1) lines.push(`M${col} 0V${rows}`);
  return lines.join('');
}

function wide(frame) {
  return Math.max(frame.width, Math.min(256, 4 * frame.width));
}

function boxShapes(sample, frame) {
  const size = (15 * frame.cols) / wide(frame); // of letters: 15 pixels, where one unit is one token
  return sample.boxes.map(([x1, y1, x2, y2, label]) => {
    const [x, y] = [(x1 / 1000) * frame.cols, (y1 / 1000) * frame.rows];
    const [width, height] = [((x2 - x1) / 1000) * frame.cols, ((y2 - y1) / 1000) * frame.rows];
    return s('g', { class: 'box' }, s('rect', { x, y, width, height }), label && s('text', { x: x + 0.4 * size, y: y + 1.1 * size, 'font-size': size, 'stroke-width': 0.2 * size }, label));
  });
}

function frameName(sample, frame) {
  const media = new Set(sample.frames.map((one) => one.medium)).size;
  const name = frame.frames > 1 ? `clip ${frame.medium + 1}, first frame of pair ${frame.frame + 1} of ${frame.frames}` : media > 1 ? `picture ${frame.medium + 1}` : 'picture';
  return `${name}: ${frame.width} × ${frame.height} pixels, ${frame.cols} × ${frame.rows} = ${plural(frame.cols * frame.rows, 'token')}`;
}

function picture(sample, frame) {
  const here = s('rect', { class: 'here', width: 1, height: 1, visibility: 'hidden' });
  const overlay = s('svg', { class: 'overlay', viewBox: `0 0 ${frame.cols} ${frame.rows}`, preserveAspectRatio: 'none', 'aria-hidden': 'true' },
    s('path', { class: 'grid under', d: gridPath(frame.rows, frame.cols) }),
    s('path', { class: 'grid over', d: gridPath(frame.rows, frame.cols) }),
    here, s('g', { class: 'boxes' }, boxShapes(sample, frame)));
  const view = h('div', { class: 'view' },
    h('img', { src: frame.src, alt: frameName(sample, frame), class: frame.width < 192 && 'small', loading: 'lazy' }), overlay);
  view.addEventListener('pointermove', (event) => {
    const area = overlay.getBoundingClientRect();
    const col = Math.min(frame.cols - 1, Math.max(0, Math.floor(((event.clientX - area.left) / area.width) * frame.cols)));
    const row = Math.min(frame.rows - 1, Math.max(0, Math.floor(((event.clientY - area.top) / area.height) * frame.rows)));
    here.setAttribute('x', col);
    here.setAttribute('y', row);
    here.setAttribute('visibility', 'visible');
    const place = frame.offset + row * frame.cols + col;
    showTip([`row ${row + 1}, column ${col + 1}`, ...tokenTip(sample, place)], event.clientX, event.clientY);
  });
  view.addEventListener('pointerleave', () => {
    here.setAttribute('visibility', 'hidden');
    hideTip();
  });
  return h('figure', { class: 'picture', vars: { '--wide': `${wide(frame)}px` } }, view, h('figcaption', null, frameName(sample, frame)));
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
  const tell = (span) => {
    const area = span.getBoundingClientRect();
    showTip(tokenTip(sample, Number(span.dataset.place)), area.left, area.bottom - 14);
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

function sampleCard(sample, level) {
  const trained = sample.weights.filter((weight) => weight > 0).length;
  const visual = sample.visual.reduce((all, [, length]) => all + length, 0);
  const body = h('div', { class: 'body' });
  const card = h('details', { class: 'sample', 'data-id': sample.id, 'data-source': sample.source },
    h('summary', null,
      sample.frames.length > 0 && h('img', { class: 'thumb', src: sample.frames[0].src, alt: '' }),
      h('span', { class: 'name' }, sample.id),
      h('span', { class: 'evidence' }, `${plural(sample.ids.length, 'token')} · ${count(visual)} visual · ${count(trained)} trained`),
      sample.kinds.map((kind) => h('span', { class: `badge ${level(kind)}` }, kind))),
    body);
  // A thousand tokens are a thousand elements, so they are made when the card is first opened.
  const show = () => {
    if (!card.open || body.childElementCount) return;
    fill(body, h('div', { class: 'pictures' }, sample.frames.map((frame) => picture(sample, frame))), tokenView(sample));
  };
  card.addEventListener('toggle', show);
  return card;
}

function renderSamples(samples, kinds) {
  const cards = samples.map((sample) => ({
    source: sample.source,
    kinds: sample.kinds,
    text: `${sample.id}\n${sample.texts.filter((text, place) => text !== '<|image_pad|>').join('')}`.toLowerCase(),
    element: sampleCard(sample, (kind) => kinds[kind].level),
  }));
  fill(at('samples'),
    h('h2', { id: 'samples-title' }, 'Samples as the model sees them'), legend(),
    h('div', { id: 'filters', role: 'search' }),
    cards.map((card) => card.element),
    h('p', { id: 'none', hidden: true }, 'No sample matches.'));
  if (cards.length) cards[0].element.open = true;
  return cards;
}
