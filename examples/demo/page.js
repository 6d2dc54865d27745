// The four at the top have no sound; the others are in a frame each.
const tiles = [...document.querySelectorAll('.tiles video')];
const screens = [...document.querySelectorAll('.screen')];
const pause = document.getElementById('pause');
const inView = new Set();
let playing = !matchMedia('(prefers-reduced-motion: reduce)').matches;

function video(screen) {
  return screen.querySelector('video') ?? screen;
}

function update(screen) {
  if (playing && inView.has(screen)) {
    video(screen).play().catch(() => {}); // the poster stays
  } else {
    video(screen).pause();
  }
}

function setPlaying(value) {
  playing = value;
  pause.textContent = playing ? 'Pause' : 'Play';
  [...tiles, ...screens].forEach(update);
}

function setSound(heard) {
  for (const screen of screens) {
    const on = screen === heard;
    screen.setAttribute('aria-pressed', on);
    video(screen).muted = !on;
  }
}

// Only what can be seen plays; what was heard falls silent as it leaves.
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) {
      inView.add(target);
    } else {
      inView.delete(target);
      if (target.getAttribute('aria-pressed') === 'true') setSound(null);
    }
    update(target);
  }
});

for (const tile of tiles) observer.observe(tile);
for (const screen of screens) {
  observer.observe(screen);
  screen.addEventListener('click', () => {
    const heard = screen.getAttribute('aria-pressed') === 'true';
    setSound(heard ? null : screen);
    if (heard) return;
    setPlaying(true);
    // Generated and truth start together.
    for (const other of screen.parentElement.children) video(other).currentTime = 0;
  });
}
pause.hidden = false;
pause.addEventListener('click', () => setPlaying(!playing));
setPlaying(playing);

for (const code of document.querySelectorAll('.code')) {
  if (!navigator.clipboard) break; // pages of plain http have none
  const button = document.createElement('button');
  button.type = 'button';
  button.className = 'pill copy';
  button.textContent = 'Copy';
  button.addEventListener('click', async () => {
    await navigator.clipboard.writeText(code.querySelector('code').textContent);
    button.textContent = 'Copied';
    setTimeout(() => (button.textContent = 'Copy'), 1500);
  });
  code.append(button);
}
