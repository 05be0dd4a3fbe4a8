'use strict';
// Everything that comes from a model, a person or the server is put in as text, never as markup.
const $ = (id) => document.getElementById(id);
const EFFORT = { chat: 'none', thinking: 'high', max: 'max' };
const REASONS = { length: 'cut off: no tokens left', tool_calls: 'asks for a tool', stop: '' };
let messages = [];
let running = null; // an AbortController while an answer arrives
let capacity = 0;

function bytes(count) {
  for (const unit of ['B', 'kB', 'MB', 'GB']) {
    if (count < 1000) return `${count.toFixed(unit === 'B' ? 0 : 1)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(1)} TB`;
}

const number = (count) => count.toLocaleString('en');

function add(parent, tag, className, text = '') {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  parent.append(made);
  return made;
}

function headers() {
  const key = $('key').value.trim();
  return { 'Content-Type': 'application/json', ...(key && { Authorization: `Bearer ${key}` }) };
}

/** The sentence of a refusal; 401 shows where a key goes. */
async function refusal(response) {
  if (response.status === 401) $('key-row').hidden = false;
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

function scrolls(change) {
  const main = document.querySelector('main');
  const follow = main.scrollHeight - main.scrollTop - main.clientHeight < 40;
  change();
  if (follow) main.scrollTop = main.scrollHeight;
}

/** An assistant's turn on the page, which grows. */
function opened() {
  const turn = add($('log'), 'div', 'turn assistant running');
  let thought = null;
  const body = add(turn, 'div', 'body');
  const note = add(turn, 'div', 'note');
  return {
    reasoning(text) {
      if (!thought) {
        const fold = document.createElement('details');
        fold.className = 'thought';
        turn.prepend(fold);
        add(fold, 'summary', '', 'Reasoning');
        thought = add(fold, 'div', '');
      }
      thought.append(text);
    },
    content: (text) => body.append(text),
    closed(text, failed = false) {
      turn.classList.remove('running');
      turn.classList.toggle('failed', failed);
      note.textContent = text;
    },
  };
}

/** Values of a response's events, until [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split('\n\n');
    rest = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith('data: ')) continue;
      if (block === 'data: [DONE]') return;
      yield JSON.parse(block.slice(6));
    }
  }
}

function showUsage(usage, seconds) {
  const count = usage.completion_tokens;
  if (count > 1 && seconds > 0) $('speed').textContent = `${((count - 1) / seconds).toFixed(1)} tokens/s`;
  $('used').textContent = `${number(usage.total_tokens)} / ${number(capacity)}`;
  $('context').value = capacity ? usage.total_tokens / capacity : 0;
  const cached = usage.prompt_tokens_details.cached_tokens;
  $('cached').textContent = `${number(cached)} of ${number(usage.prompt_tokens)}`;
}

function question() {
  const system = $('system').value.trim();
  const most = parseInt($('most').value, 10);
  return {
    messages: [...(system ? [{ role: 'system', content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    reasoning_effort: EFFORT[$('mode').value],
    temperature: Number($('temperature').value) || 0,
    ...(most > 0 && { max_tokens: most }),
  };
}

/** Ask, show what comes, and return the assistant's message and why it ended. */
async function answer(turn, signal) {
  const message = { role: 'assistant', content: '' };
  let first = 0, finish = '', usage = null;
  try {
    const response = await fetch('v1/chat/completions', {
      method: 'POST', headers: headers(), body: JSON.stringify(question()), signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const now = performance.now();
      if (event.usage) {
        usage = event.usage;
        if (usage.completion_tokens && !first) first = now;
        if (event.choices.length) showUsage(usage, (now - first) / 1000);
      }
      for (const { delta, finish_reason: reason } of event.choices) {
        scrolls(() => {
          if (delta.reasoning_content) turn.reasoning(delta.reasoning_content);
          if (delta.content) turn.content(delta.content);
        });
        if (delta.reasoning_content) message.reasoning_content = (message.reasoning_content || '') + delta.reasoning_content;
        if (delta.content) message.content += delta.content;
        if (reason) finish = REASONS[reason] ?? reason;
      }
    }
  } catch (error) {
    if (error.name !== 'AbortError') throw error;
    finish = 'stopped';
  }
  const count = usage ? `${number(usage.completion_tokens)} tokens` : '';
  return { message, note: [count, finish].filter(Boolean).join(', ') };
}

async function send() {
  const text = $('text').value.trim();
  if (!text || running) return;
  $('empty').hidden = true;
  $('text').value = '';
  messages.push({ role: 'user', content: text });
  const asked = messages;
  running = new AbortController();
  buttons();
  let turn;
  scrolls(() => {
    add(add($('log'), 'div', 'turn user'), 'div', 'body', text);
    turn = opened();
  });
  try {
    const { message, note } = await answer(turn, running.signal);
    asked.push(message);
    turn.closed(note);
  } catch (error) {
    asked.pop();
    turn.closed(error.message, true);
    if (!$('text').value) $('text').value = text;
  } finally {
    running = null;
    buttons();
    stats();
  }
}

function buttons() {
  $('stop').hidden = !running;
  $('send').hidden = Boolean(running);
}

async function stats() {
  if (document.hidden) return;
  try {
    const response = await fetch('stats', { headers: headers() });
    if (!response.ok) return void ($('model').textContent = await refusal(response));
    const now = await response.json();
    if (!capacity) $('mode').value = now.mode;
    capacity = now.capacity;
    $('model').textContent = now.model;
    document.title = `${now.model}: chat`;
    if ($('used').textContent === '–') $('used').textContent = `0 / ${number(capacity)}`;
    $('state').textContent = bytes(now.state_bytes);
    $('slots').textContent = `${now.running} of ${now.slots}${now.waiting ? `, ${now.waiting} wait` : ''}`;
  } catch {
    $('model').textContent = 'the server does not answer';
  }
}

$('form').addEventListener('submit', (event) => { event.preventDefault(); send(); });
$('text').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
$('stop').addEventListener('click', () => running?.abort());
$('new').addEventListener('click', () => {
  running?.abort();
  messages = [];
  $('log').replaceChildren($('empty'));
  $('empty').hidden = false;
  $('text').focus();
});
$('key').addEventListener('change', stats);
setInterval(stats, 1000);
stats();
$('text').focus();
