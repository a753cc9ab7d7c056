// Summary, warnings, sources and packs: the facts that --json holds, too.

const LEVELS = { error: '✖ error', warning: '▲ warning', note: '● note' };

function tile(value, name, more) {
  return h('div', { class: 'tile' }, h('b', null, value), h('span', null, name), more && h('small', null, more));
}

function renderHeader(facts) {
  const model = facts.model;
  const theme = h('button', { id: 'theme', type: 'button' }, 'Dark / light');
  fill(at('header'),
    h('div', null,
      h('h1', null, 'Data of ', facts.recipe),
      h('p', null, `${model.path} · ${model.template} template · a picture takes `,
        `${count(model.min_visual_tokens_per_image)} to ${count(model.max_visual_tokens_per_image)} visual tokens of 32 × 32 pixels`)),
    theme);
}

function renderSummary(facts) {
  const sum = (what, role = 'train') => facts.sources.filter((one) => one.role === role).reduce((all, one) => all + one[what], 0);
  const packs = facts.packs, tokens = sum('tokens'), visual = sum('visual_tokens');
  const held = sum('usable', 'eval');
  fill(at('summary'),
    tile(count(sum('usable')), 'training rows', `${plural(sum('rejected'), 'row')} rejected` + (held ? `, ${count(held)} held out` : '')),
    tile(count(tokens), 'tokens', `${count(tokens - visual)} text, ${count(visual)} visual`),
    tile(percent(sum('label_tokens'), sum('examined_tokens')), 'of tokens trained', `${count(sum('label_tokens'))} label tokens`),
    tile(count(packs.packs), packs.streamed ? 'packs planned' : `${packs.packs === 1 ? 'pack' : 'packs'} an epoch`,
      `${percent(packs.mean_fill, 1)} filled, up to ${count(packs.max_tokens_per_pack)} tokens` + (packs.streamed ? ', of the first rows of the streams' : '')),
    packs.streamed
      ? tile(count(packs.num_steps), 'steps in the run', `${plural(packs.packs_per_step, 'pack')} each; an epoch of a stream has no known length`)
      : tile(count(packs.steps_per_epoch), `${packs.steps_per_epoch === 1 ? 'step' : 'steps'} an epoch`,
        `${plural(packs.num_steps, 'step')} in the run, ${plural(packs.packs_per_step, 'pack')} each`));
}

// choose: called with a kind of warning, to show its samples. Returns what filters need of each card.
function renderWarnings(facts, shownKinds, choose) {
  const cards = facts.hazards.map((hazard) => ({
    source: hazard.source,
    kinds: [hazard.kind],
    element: h('article', { class: `warning ${hazard.level}`, 'data-kind': hazard.kind },
      h('h3', null, h('span', { class: 'level' }, LEVELS[hazard.level]), h('code', null, hazard.kind), hazard.source && h('span', { class: 'where' }, hazard.source)),
      h('p', null, hazard.hazard),
      h('p', { class: 'remedy' }, h('b', null, 'Remedy: '), hazard.remedy),
      h('p', { class: 'evidence' }, hazard.evidence, hazard.rows.length > 0 && ` · ${rowList(hazard.rows, hazard.count)}`),
      shownKinds.has(hazard.kind) && h('button', { type: 'button', on: { click: () => choose(hazard.kind) } }, 'Show samples')),
  }));
  fill(at('warnings'),
    h('h2', { id: 'warnings-title' }, cards.length ? plural(cards.length, 'warning') : 'No warnings'),
    cards.length ? h('div', { class: 'cards' }, cards.map((card) => card.element)) : h('p', { class: 'fine' }, '✔ Nothing looks wrong.'));
  return cards;
}

function rejectTable(source) {
  if (!source.rejects.length) return null;
  return h('details', { class: 'rejects', open: source.rejects.length < 6 },
    h('summary', null, `${plural(source.rejected, 'row')} rejected, for ${plural(source.rejects.length, 'kind of reason', 'kinds of reasons')}`),
    h('div', { class: 'scroll' }, h('table', null,
      h('thead', null, h('tr', null, h('th', null, 'Rows'), h('th', null, 'First reason'), h('th', null, 'Where'))),
      h('tbody', null, source.rejects.map((group) => h('tr', null,
        h('td', { class: 'number' }, count(group.count)), h('td', null, group.reason), h('td', null, rowList(group.rows, group.count, 50))))))));
}

function duplicateLines(source) {
  const same = source.duplicates;
  const some = (pairs, total) => pairs.slice(0, 10).map(([row, first]) => `${row} = ${first}`).join(', ') + (total > 10 ? ', …' : '');
  return [
    same.count > 0 && h('p', null, h('b', null, `${plural(same.count, 'duplicate')}: `), some(same.pairs, same.count)),
    same.leaked > 0 && h('p', null, h('b', null, `${count(same.leaked)} also in training: `), some(same.leaked_pairs, same.leaked)),
    source.num_nothing_to_learn > 0 && h('p', null, h('b', null, 'Nothing to learn: '),
      rowList(source.nothing_to_learn, source.num_nothing_to_learn)),
  ];
}

function formatText(formats) {
  const names = Object.entries(formats);
  return names.length === 1 ? names[0][0] : names.map(([name, number]) => `${name} ${count(number)}`).join(', ') || 'no row read';
}

function renderSources(facts) {
  const cards = facts.sources.map((source) => {
    const charts = source.histograms;
    const part = source.examined < source.usable ? ` · ${count(source.examined)} rows examined for all but token counts` : '';
    return {
      source: source.name,
      kinds: facts.hazards.filter((hazard) => hazard.source === source.name).map((hazard) => hazard.kind),
      element: h('article', { class: 'source', 'data-source': source.name },
        h('h3', null, source.name, h('span', { class: 'where' }, source.role === 'eval' ? 'held out' : facts.packs.streamed ? 'training, first rows of a stream' : 'training')),
        h('p', { class: 'evidence' },
          `${formatText(source.formats)} · ${source.files > 1 ? `${plural(source.files, 'file')} · ` : ''}${plural(source.rows, 'row')}, ${count(source.usable)} usable${source.dropped ? `, ${count(source.dropped)} dropped as too long` : ''} · ${plural(source.images, 'picture')}`,
          source.videos > 0 && ` · ${plural(source.videos, 'video')}`,
          ` · ${count(source.tokens)} tokens, ${percent(source.label_tokens, source.examined_tokens)} trained`,
          source.role === 'train' && ` · weight ${source.weight}`, part),
        h('div', { class: 'charts' },
          histogram('Text tokens', charts.text_tokens, 'row'),
          histogram('Visual tokens', charts.visual_tokens, 'row'),
          histogram('Pictures a row', charts.images, 'row'),
          histogram('Width : height', charts.aspect_ratios, 'picture'),
          histogram('Answers a row', charts.turns, 'row')),
        rejectTable(source), duplicateLines(source)),
    };
  });
  fill(at('sources'), h('h2', { id: 'sources-title' }, plural(cards.length, 'source')), cards.map((card) => card.element));
  return cards;
}

const RUN_NAMES = { prompt: 'read, not trained', visual: 'visual', trained: 'trained' };

function packStrip(pack) {
  const bars = pack.sequences.flatMap((sequence) => {
    let start = sequence.start;
    const parts = sequence.runs.map(([kind, length]) => {
      const title = s('title', null, `${sequence.id}: ${plural(length, 'token')} ${RUN_NAMES[kind]}, from place ${count(start)} of the pack`);
      const bar = s('rect', { class: `run ${kind}`, x: start, y: 0, width: length, height: 34 }, title);
      start += length;
      return bar;
    });
    return [...parts, s('line', { class: 'boundary', x1: start, x2: start, y1: -3, y2: 37 })];
  });
  const used = pack.sequences.reduce((all, sequence) => all + sequence.length, 0);
  return h('div', { id: 'pack' },
    h('h3', null, 'One pack'),
    h('p', { class: 'evidence' }, `${plural(pack.sequences.length, 'sample')} in one row of ${count(used)} tokens, room for ${count(pack.max_tokens)}. `,
      'Attention never crosses a boundary, and positions start again at (0, 0, 0) behind each.'),
    s('svg', { class: 'strip', viewBox: `0 -4 ${pack.max_tokens} 42`, preserveAspectRatio: 'none', role: 'img', 'aria-label': 'samples of a pack, end to end' },
      s('rect', { class: 'room', x: 0, y: 0, width: pack.max_tokens, height: 34 }), bars),
    legend(),
    h('details', null, h('summary', null, 'Samples of this pack'), h('div', { class: 'scroll' }, h('table', null,
      h('thead', null, h('tr', null, ['Sample', 'First place', 'Tokens', 'Visual', 'Trained', 'Last position (t, h, w)'].map((name) => h('th', null, name)))),
      h('tbody', null, pack.sequences.map((sequence) => {
        const of = (kind) => sequence.runs.filter((run) => run[0] === kind).reduce((all, run) => all + run[1], 0);
        return h('tr', null, h('td', null, sequence.id), [sequence.start, sequence.length, of('visual'), of('trained')].map((value) => h('td', { class: 'number' }, count(value))),
          h('td', { class: 'number' }, `(${sequence.last_position.join(', ')})`));
      }))))));
}

function renderPacks(facts, pack) {
  const charts = facts.packs.histograms;
  fill(at('packs'),
    h('h2', { id: 'packs-title' }, 'Packs'),
    h('div', { class: 'charts' }, histogram('Fill, percent', charts.fill_percent, 'pack'), histogram('Samples a pack', charts.sequences, 'pack')));
  if (pack) fill(at('packs'), packStrip(pack));
}
