// Everything on the page is made by h() and s(): text becomes text nodes, never markup.

const SVG = 'http://www.w3.org/2000/svg';

function build(element, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === 'on') for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (name === 'vars') for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else element.setAttribute(name, value === true ? '' : value);
  }
  return fill(element, ...children);
}

// Children are elements, texts, lists of them, or nothing (null, undefined, false).
function fill(element, ...children) {
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function h(tag, properties, ...children) {
  return build(document.createElement(tag), properties, children);
}

function s(tag, properties, ...children) {
  return build(document.createElementNS(SVG, tag), properties, children);
}

function at(id) {
  return document.getElementById(id);
}

function count(value, digits = 0) {
  return value.toLocaleString('en-US', { maximumFractionDigits: digits });
}

function percent(part, whole, digits = 1) {
  return whole ? `${count((100 * part) / whole, digits)}%` : '–';
}

function plural(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

function rowList(rows, total, most = 12) {
  const rest = total - Math.min(most, rows.length);
  return `${total === 1 ? 'row' : 'rows'} ${rows.slice(0, most).join(', ')}${rest > 0 ? ` and ${count(rest)} more` : ''}`;
}

// columns: [name, whether it holds numbers]; rows: lists of texts.
function table(columns, rows) {
  const line = (tag, texts) => h('tr', null, texts.map((text, index) => h(tag, { class: columns[index][1] && 'number' }, text)));
  return h('div', { class: 'scroll' }, h('table', null,
    h('thead', null, line('th', columns.map(([name]) => name))),
    h('tbody', null, rows.map((row) => line('td', row)))));
}

// One small box that follows the pointer, or the token that the arrow keys have reached.
function showTip(lines, x, y) {
  const tip = at('tip');
  tip.replaceChildren(...lines.map((line) => h('div', null, line)));
  tip.hidden = false;
  const left = Math.min(x + 14, window.innerWidth - tip.offsetWidth - 8);
  const below = y + 18 + tip.offsetHeight < window.innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? y + 18 : Math.max(8, y - tip.offsetHeight - 10)}px`;
}

function hideTip() {
  at('tip').hidden = true;
}
