// Summary, warnings and sources: the facts that --json holds, too.

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
      h('p', null, `${model.path} · ${model.template} template · an image takes `,
        `${count(model.min_visual_tokens_per_image)} to ${count(model.max_visual_tokens_per_image)} visual tokens of 32 × 32 pixels`)),
    theme);
}

function renderSummary(facts) {
  const sum = (what, role = 'train') => facts.sources.filter((one) => one.role === role).reduce((all, one) => all + one[what], 0);
  const packs = facts.packs, tokens = sum('tokens'), visual = sum('visual_tokens');
  const held = sum('usable', 'eval'), dropped = sum('dropped');
  const left = [`${count(sum('rejected'))} rejected`, dropped && `${count(dropped)} dropped as too long`, held && `${count(held)} held out`];
  fill(at('summary'),
    tile(count(sum('usable')), 'training rows', left.filter(Boolean).join(', ')),
    tile(count(tokens), 'tokens', `${count(tokens - visual)} text, ${count(visual)} visual`),
    tile(percent(sum('label_tokens'), sum('examined_tokens')), 'of tokens trained', `${count(sum('label_tokens'))} label tokens`),
    tile(count(packs.packs), packs.streamed ? 'packs planned' : `${packs.packs === 1 ? 'pack' : 'packs'} an epoch`,
      `${percent(packs.mean_fill, 1)} of ${count(packs.max_tokens_per_pack)} tokens filled` + (packs.streamed ? ', of the first rows of the streams' : '')),
    packs.streamed
      ? tile(count(packs.num_steps), 'steps in the run', `${plural(packs.packs_per_step, 'pack')} each; an epoch of a stream has no known length`)
      : tile(count(packs.steps_per_epoch), `${packs.steps_per_epoch === 1 ? 'step' : 'steps'} an epoch`,
        `${plural(packs.num_steps, 'step')} in the run, ${plural(packs.packs_per_step, 'pack')} each`));
}

function verdict(findings) {
  const levels = Object.keys(LEVELS).map((level) => [level, findings.filter((finding) => finding.level === level).length]);
  return levels.filter(([, number]) => number).map(([level, number]) => plural(number, level)).join(', ') || 'No warnings';
}

// choose: called with a check, to show its samples. Returns what filters need of each card.
function renderWarnings(facts, shownChecks, choose) {
  const cards = facts.hazards.map((finding) => ({
    source: finding.source,
    checks: [finding.kind],
    element: h('article', { class: `warning ${finding.level}`, 'data-check': finding.kind },
      h('h3', null, h('span', { class: 'level' }, LEVELS[finding.level]), h('code', null, finding.kind), finding.source && h('span', { class: 'where' }, finding.source)),
      h('p', null, finding.hazard),
      h('p', { class: 'remedy' }, h('b', null, 'Remedy: '), finding.remedy),
      h('p', { class: 'evidence' }, finding.evidence, finding.rows.length > 0 && ` · ${rowList(finding.rows, finding.count)}`),
      shownChecks.has(finding.kind) && h('button', { type: 'button', on: { click: () => choose(finding.kind) } }, 'Show samples')),
  }));
  fill(at('warnings'),
    h('h2', { id: 'warnings-title' }, verdict(facts.hazards)),
    cards.length ? h('div', { class: 'cards' }, cards.map((card) => card.element)) : h('p', { class: 'fine' }, '✔ Nothing looks wrong.'));
  return cards;
}

function rejectTable(source) {
  if (!source.rejects.length) return null;
  return h('details', { class: 'rejects', open: source.rejects.length < 6 },
    h('summary', null, `${plural(source.rejected, 'row')} rejected, for ${plural(source.rejects.length, 'kind of reason', 'kinds of reasons')}`),
    table([['Rows', true], ['Reason, of the first'], ['Kind'], ['Where']],
      source.rejects.map((group) => [count(group.count), group.reason, group.kind, rowList(group.rows, group.count, 50)])));
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

function ignoredLine(source) {
  const names = Object.entries(source.ignored);
  if (!names.length) return null;
  return h('p', { class: 'ignored' }, h('b', null, 'Ignored, in so many rows: '), names.map(([name, number]) => `${name} ${count(number)}`).join(', '));
}

function formatText(formats) {
  const names = Object.entries(formats);
  return names.length === 1 ? names[0][0] : names.map(([name, number]) => `${name} ${count(number)}`).join(', ') || '–';
}

function roleText(facts, source) {
  if (source.role === 'eval') return 'held out';
  return facts.packs.streamed ? 'training, first rows' : `training × ${count(source.weight, 3)}`;
}

function sourceTable(facts) {
  const numbers = ['Files', 'Rows', 'Usable', 'Rejected', 'Dropped', 'Images', 'Videos', 'Tokens', 'Visual', 'Trained'].map((name) => [name, true]);
  return table([['Source'], ['Role × weight'], ['Row format'], ...numbers], facts.sources.map((source) => [
    source.name, roleText(facts, source), formatText(source.formats),
    ...['files', 'rows', 'usable', 'rejected', 'dropped', 'images', 'videos', 'tokens'].map((what) => count(source[what])),
    percent(source.visual_tokens, source.tokens), percent(source.label_tokens, source.examined_tokens)]));
}

function sourceCard(facts, source) {
  const charts = source.histograms;
  return h('article', { class: 'source', 'data-source': source.name },
    h('h3', null, source.name, h('span', { class: 'where' }, roleText(facts, source)),
      source.examined < source.usable && h('span', { class: 'where' }, `${count(source.examined)} of ${count(source.usable)} usable rows examined for all but token counts`)),
    h('div', { class: 'charts' },
      histogram('Text tokens', charts.text_tokens, 'row'),
      histogram('Visual tokens', charts.visual_tokens, 'row'),
      histogram('Images a row', charts.images, 'row'),
      histogram('Width : height', charts.aspect_ratios, 'image'),
      histogram('Answers a row', charts.turns, 'row')),
    rejectTable(source), duplicateLines(source), ignoredLine(source));
}

function renderSources(facts) {
  const cards = facts.sources.map((source) => ({
    source: source.name,
    checks: facts.hazards.filter((finding) => finding.source === source.name).map((finding) => finding.kind),
    element: sourceCard(facts, source),
  }));
  fill(at('sources'), h('h2', { id: 'sources-title' }, plural(cards.length, 'source')), sourceTable(facts), cards.map((card) => card.element));
  return cards;
}
