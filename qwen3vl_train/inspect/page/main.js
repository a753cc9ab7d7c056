// Puts the page together, and filters it.

const data = JSON.parse(at('data').textContent);

function options(names, all) {
  return [h('option', { value: '' }, all), names.map((name) => h('option', { value: name }, name))];
}

// Warnings and sources are filtered by source and check, samples by these and by words.
function addFilters(sampleCards, otherCards) {
  const search = h('input', { id: 'search', type: 'search', placeholder: 'Text in samples', 'aria-label': 'Text in samples' });
  const source = h('select', { id: 'source', 'aria-label': 'Source' }, options(data.facts.sources.map((one) => one.name), 'All sources'));
  const known = [...new Set([...data.facts.hazards.map((one) => one.kind), ...data.samples.flatMap((one) => one.checks)])].sort();
  const check = h('select', { id: 'check', 'aria-label': 'Warning' }, options(known, 'All warnings'));
  const shown = h('output', { id: 'shown', 'aria-live': 'polite' });

  const fits = (card) => (!source.value || !card.source || card.source === source.value) && (!check.value || card.checks.includes(check.value));
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
  for (const control of [search, source, check]) control.addEventListener('input', apply);
  const links = ['Warnings', 'Sources', 'Packs', 'Samples'].map((name) => h('a', { href: `#${name.toLowerCase()}` }, name));
  fill(at('filters'), h('span', { class: 'links' }, links), source, check, search, shown);
  apply();
  return (chosen) => {
    [check.value, source.value, search.value] = [chosen, '', ''];
    apply();
    for (const card of sampleCards) card.element.open = !card.element.hidden;
    at('samples').scrollIntoView();
  };
}

function addOverlaySwitches() {
  const ticks = [['grid', 'Patches of 16 × 16 pixels (dotted), 2 × 2 of them a token'], ['marks', 'Boxes and points']].map(([name, text]) => {
    const box = h('input', { id: name, type: 'checkbox', checked: true });
    const show = () => document.body.classList.toggle(`with-${name}`, box.checked);
    box.addEventListener('input', show);
    show();
    return h('label', { class: 'tick' }, box, text);
  });
  fill(at('overlays'), ticks);
}

function addThemeSwitch() {
  const root = document.documentElement;
  root.dataset.theme = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';
  at('theme').addEventListener('click', () => {
    root.dataset.theme = root.dataset.theme === 'dark' ? 'light' : 'dark';
  });
}

let choose = () => {};
renderHeader(data.facts);
addThemeSwitch();
renderSummary(data.facts);
const shownChecks = new Set(data.samples.flatMap((sample) => sample.checks));
const warningCards = renderWarnings(data.facts, shownChecks, (check) => choose(check));
const sourceCards = renderSources(data.facts);
renderPacks(data.facts.packs, data.pack);
choose = addFilters(renderSamples(data.samples, data.facts.hazards, data.checks), [...warningCards, ...sourceCards]);
addOverlaySwitches();
