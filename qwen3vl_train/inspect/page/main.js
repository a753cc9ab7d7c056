// Puts the page together, and filters it.

const data = JSON.parse(at('data').textContent);

function options(names, all) {
  return [h('option', { value: '' }, all), names.map((name) => h('option', { value: name }, name))];
}

function addFilters(sampleCards, otherCards) {
  const search = h('input', { id: 'search', type: 'search', placeholder: 'Text in samples' });
  const source = h('select', { id: 'source' }, options(data.facts.sources.map((one) => one.name), 'All sources'));
  const known = [...new Set([...data.facts.hazards.map((one) => one.kind), ...data.samples.flatMap((one) => one.kinds)])].sort();
  const kind = h('select', { id: 'kind' }, options(known, 'All warnings'));
  const shown = h('output', { id: 'shown', 'aria-live': 'polite' });
  const grid = h('input', { id: 'grid', type: 'checkbox' });
  const boxes = h('input', { id: 'boxes', type: 'checkbox', checked: true });

  const fits = (card) => (!source.value || !card.source || card.source === source.value) && (!kind.value || card.kinds.includes(kind.value));
  const apply = () => {
    const words = search.value.trim().toLowerCase();
    let matching = 0;
    for (const card of otherCards) card.element.hidden = !fits(card);
    for (const card of sampleCards) {
      const match = fits(card) && card.text.includes(words);
      card.element.hidden = !match;
      matching += match;
    }
    shown.value = `${matching} of ${plural(sampleCards.length, 'sample')}`;
    at('none').hidden = matching > 0;
  };
  const overlays = () => {
    document.body.classList.toggle('with-grid', grid.checked);
    document.body.classList.toggle('with-boxes', boxes.checked);
  };
  for (const control of [search, source, kind]) control.addEventListener('input', apply);
  for (const control of [grid, boxes]) control.addEventListener('input', overlays);
  fill(at('filters'),
    h('label', null, 'Search', search), h('label', null, 'Source', source), h('label', null, 'Warning', kind),
    h('label', { class: 'tick' }, grid, 'Token grid'), h('label', { class: 'tick' }, boxes, 'Boxes'), shown);
  apply();
  overlays();
  return (chosen) => {
    [kind.value, source.value, search.value] = [chosen, '', ''];
    apply();
    for (const card of sampleCards) card.element.open = !card.element.hidden;
    at('samples').scrollIntoView();
  };
}

function addThemeSwitch() {
  at('theme').addEventListener('click', () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
    root.dataset.theme = dark ? 'light' : 'dark';
  });
}

let choose = () => {};
renderHeader(data.facts);
renderSummary(data.facts);
const shownKinds = new Set(data.samples.flatMap((sample) => sample.kinds));
const warningCards = renderWarnings(data.facts, shownKinds, (kind) => choose(kind));
const sourceCards = renderSources(data.facts);
renderPacks(data.facts, data.pack);
choose = addFilters(renderSamples(data.samples, data.kinds), [...warningCards, ...sourceCards]);
addThemeSwitch();
