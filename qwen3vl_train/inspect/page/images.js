// Images at the size the model sees, with their patches, tokens, boxes and points. One unit of the overlay is a token.

const PATCHES = 2; // a side of a token

function gridPath(rows, cols, step, skip) {
  const lines = [];
  for (let row = 1; row * step < rows; row += 1) if (row % skip) lines.push(`M0 ${row * step}H${cols}`);
  for (let col = 1; col * step < cols; col += 1) if (col % skip) lines.push(`M${col * step} 0V${rows}`);
  return lines.join('');
}

// Dark below and light above, so that lines are seen on every image.
function gridLines(frame) {
  const patches = gridPath(frame.rows, frame.cols, 1 / PATCHES, PATCHES);
  const tokens = gridPath(frame.rows, frame.cols, 1, Infinity);
  return ['under', 'over'].flatMap((layer) => [
    s('path', { class: `grid patch ${layer}`, d: patches }), s('path', { class: `grid token-edge ${layer}`, d: tokens })]);
}

function wide(frame) {
  return Math.max(frame.width, Math.min(256, 4 * frame.width));
}

function markShape(mark, frame) {
  const pixel = frame.cols / wide(frame);
  const [x, y, x2, y2] = mark.values.map((value, index) => (value / 1000) * (index % 2 ? frame.rows : frame.cols));
  const label = (left, top) => mark.label && s('text', { x: left, y: top, 'font-size': 15 * pixel, 'stroke-width': 3 * pixel }, mark.label);
  if (mark.values.length === 4) {
    return s('g', { class: 'mark box' }, s('rect', { x, y, width: x2 - x, height: y2 - y }), label(x + 6 * pixel, y + 17 * pixel));
  }
  return s('g', { class: 'mark point' }, s('circle', { cx: x, cy: y, r: 6 * pixel }), s('circle', { class: 'heart', cx: x, cy: y, r: 1.5 * pixel }), label(x + 10 * pixel, y + 5 * pixel));
}

function frameName(sample, frame) {
  const media = new Set(sample.frames.map((one) => one.medium)).size;
  const name = frame.frames > 1 ? `clip ${frame.medium + 1}, first frame of pair ${frame.frame + 1} of ${frame.frames}` : media > 1 ? `image ${frame.medium + 1}` : 'image';
  return `${name}: ${frame.width} × ${frame.height} pixels, ${PATCHES * frame.cols} × ${PATCHES * frame.rows} patches, ${frame.cols} × ${frame.rows} = ${plural(frame.cols * frame.rows, 'token')}`;
}

function image(sample, frame) {
  const here = s('rect', { class: 'here', width: 1, height: 1, visibility: 'hidden' });
  const marks = sample.marks.filter((mark) => mark.medium === frame.medium);
  const overlay = s('svg', { class: 'overlay', viewBox: `0 0 ${frame.cols} ${frame.rows}`, preserveAspectRatio: 'none', 'aria-hidden': 'true' },
    gridLines(frame), here, marks.map((mark) => markShape(mark, frame)));
  const view = h('div', { class: 'view' },
    h('img', { src: frame.src, alt: frameName(sample, frame), class: frame.width < 192 && 'small', loading: 'lazy' }), overlay);
  view.addEventListener('pointermove', (event) => {
    const area = overlay.getBoundingClientRect();
    const col = Math.min(frame.cols - 1, Math.max(0, Math.floor(((event.clientX - area.left) / area.width) * frame.cols)));
    const row = Math.min(frame.rows - 1, Math.max(0, Math.floor(((event.clientY - area.top) / area.height) * frame.rows)));
    here.setAttribute('x', col);
    here.setAttribute('y', row);
    here.setAttribute('visibility', 'visible');
    const position = frame.offset + row * frame.cols + col;
    showTip([`row ${row + 1}, column ${col + 1}`, ...tokenTip(sample, position)], event.clientX, event.clientY);
  });
  view.addEventListener('pointerleave', () => {
    here.setAttribute('visibility', 'hidden');
    hideTip();
  });
  return h('figure', { class: 'image', vars: { '--wide': `${wide(frame)}px` } }, view, h('figcaption', null, frameName(sample, frame)));
}
