// How full packs are, and where the samples of one of them lie.

const RUN_NAMES = { prompt: 'read, not trained', visual: 'visual', trained: 'trained' };

function packStrip(pack) {
  const bars = pack.sequences.flatMap((sequence) => {
    let start = sequence.start;
    const parts = sequence.runs.map(([use, length]) => {
      const title = s('title', null, `${sequence.id}: ${plural(length, 'token')} ${RUN_NAMES[use]}, from position ${count(start)} of the pack`);
      const bar = s('rect', { class: `run ${use}`, x: start, y: 0, width: length, height: 34 }, title);
      start += length;
      return bar;
    });
    return [...parts, s('line', { class: 'boundary', x1: start, x2: start, y1: -4, y2: 38 })];
  });
  return s('svg', { class: 'strip', viewBox: `0 -4 ${pack.max_tokens} 42`, preserveAspectRatio: 'none', role: 'img', 'aria-label': 'samples of a pack, end to end' },
    s('rect', { class: 'room', x: 0, y: 0, width: pack.max_tokens, height: 34 }), bars);
}

function packRows(pack) {
  const numbers = ['First position', 'Tokens', 'Visual', 'Trained', 'Last position (t, h, w)'].map((name) => [name, true]);
  return table([['Sample'], ...numbers], pack.sequences.map((sequence) => {
    const of = (use) => sequence.runs.filter((run) => run[0] === use).reduce((all, run) => all + run[1], 0);
    return [sequence.id, ...[sequence.start, sequence.length, of('visual'), of('trained')].map((value) => count(value)),
      `(${sequence.last_position.join(', ')})`];
  }));
}

function onePack(facts, pack) {
  const used = pack.sequences.reduce((all, sequence) => all + sequence.length, 0);
  const step = Math.ceil(pack.number / facts.packs_per_step);
  const where = facts.streamed ? 'of the first rows of the streams' : `of the first epoch, in step ${count(step)}`;
  return h('div', { id: 'pack' },
    h('h3', null, `Pack ${count(pack.number)} of ${count(facts.packs)}`, h('span', { class: 'where' }, where)),
    h('p', { class: 'evidence' }, `${plural(pack.sequences.length, 'sample')} in one row of ${count(used)} tokens, room for ${count(pack.max_tokens)}. `,
      'Black lines are boundaries: attention never crosses one, and positions start again at (0, 0, 0) after each.'),
    packStrip(pack), legend(),
    h('details', null, h('summary', null, 'Samples of this pack'), packRows(pack)));
}

function renderPacks(facts, pack) {
  fill(at('packs'), h('h2', { id: 'packs-title' }, 'Packs'));
  if (!facts.packs) return fill(at('packs'), h('p', { class: 'evidence' }, 'No row can be used, so there is no pack.'));
  return fill(at('packs'),
    h('div', { class: 'charts' }, histogram('Fill of a pack in percent', facts.histograms.fill_percent, 'pack'), histogram('Samples a pack', facts.histograms.sequences, 'pack')),
    pack && onePack(facts, pack));
}
