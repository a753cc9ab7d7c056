// Histograms as small inline images.

const WIDE = 230, HIGH = 108, LEFT = 4, RIGHT = 4, TOP = 14, BOTTOM = 19;

function edgeText(scale, value) {
  if (scale !== 'ratio') return count(value, value < 10 ? 2 : 0);
  return value >= 1 ? `${count(value, 1)}:1` : `1:${count(1 / value, 1)}`;
}

function binText(chart, bin) {
  const [low, high] = [edgeText(chart.scale, chart.edges[bin]), edgeText(chart.scale, chart.edges[bin + 1])];
  if (chart.scale === 'unit') return low;
  if (chart.scale === 'ratio' && bin === 0) return `below ${high}`;
  if (chart.scale === 'ratio' && bin === chart.counts.length - 1) return `${low} and more`;
  return `${low} to below ${high}`;
}

function spreadText(chart) {
  const show = (value) => edgeText(chart.scale, value);
  if (chart.minimum === chart.maximum) return `always ${show(chart.minimum)}`;
  const p95 = chart.scale === 'ratio' ? '' : `, p95 ${show(chart.p95)}`;
  return `${show(chart.minimum)} – ${show(chart.maximum)}, median ${show(chart.median)}${p95}`;
}

// Whole numbers and ratios are marked in the middle of their bins, all others at the edges.
function ticks(chart, step) {
  const bins = chart.counts.length, middle = chart.scale === 'unit' || chart.scale === 'ratio';
  const numTicks = middle ? bins : bins + 1;
  const every = chart.scale === 'ratio' ? 2 : Math.ceil(numTicks / 5);
  const marks = [];
  for (let index = 0; index < numTicks; index += every) {
    const x = LEFT + step * (middle ? index + 0.5 : index);
    const anchor = middle ? 'middle' : index === 0 ? 'start' : index === bins ? 'end' : 'middle';
    const value = chart.scale === 'ratio' ? Math.sqrt(chart.edges[index] * chart.edges[index + 1]) : chart.edges[index];
    marks.push(s('text', { x, y: HIGH - 6, 'text-anchor': anchor }, edgeText(chart.scale, value)));
  }
  return marks;
}

// title: what is counted; unit: of what, one of it, such as row.
function histogram(title, chart, unit) {
  const bins = chart.counts.length;
  if (!bins) return h('figure', { class: 'chart' }, h('figcaption', null, h('b', null, title), h('span', null, 'none')));
  const step = (WIDE - LEFT - RIGHT) / bins, room = HIGH - TOP - BOTTOM, tallest = Math.max(...chart.counts);
  const width = Math.min(step, 48);
  const bars = chart.counts.map((number, bin) => {
    // A bin with anything in it is never invisible.
    const height = number ? Math.max(1.5, (room * number) / tallest) : 0;
    const x = LEFT + bin * step + (step - width) / 2 + 0.75;
    const title = s('title', null, `${binText(chart, bin)}: ${plural(number, unit)}`);
    return [
      s('rect', { class: 'bar', x, y: TOP + room - height, width: Math.max(1, width - 1.5), height, rx: 1 }),
      s('rect', { class: 'hit', x: LEFT + bin * step, y: TOP, width: step, height: room }, title),
    ];
  });
  const summary = spreadText(chart);
  return h('figure', { class: 'chart' },
    h('figcaption', null, h('b', null, title), h('span', null, summary)),
    s('svg', { viewBox: `0 0 ${WIDE} ${HIGH}`, role: 'img', 'aria-label': `${title}: ${summary}` },
      s('line', { class: 'axis', x1: LEFT, x2: WIDE - RIGHT, y1: TOP + room, y2: TOP + room }),
      s('text', { x: LEFT, y: 9 }, plural(tallest, unit)),
      bars, ticks(chart, step)));
}
