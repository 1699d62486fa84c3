"""Style and script of the report. Without the script, browsers show the same values as tooltips of their own."""

STYLE = """
:root{color-scheme:light dark;--font:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;--bg:#fff;--ink:#1c2430;
--muted:#5b6675;--grid:#dfe4ea;--card:#f5f7fa;--good:#1d7a34;--worse:#b5332e;
--s0:#1f6fb4;--s1:#c4560a;--s2:#2a8a3e;--s3:#8e44ad;--s4:#0f8b8d;--s5:#7d5a4f}
@media (prefers-color-scheme:dark){:root{--bg:#11161d;--ink:#e6ebf1;--muted:#9aa7b6;--grid:#2a333f;--card:#1a212b;
--good:#5ecb78;--worse:#f2827b;--s0:#6cb4f5;--s1:#f5a05a;--s2:#62c979;--s3:#c79be8;--s4:#4fc4c6;--s5:#cba99c}}
*{box-sizing:border-box}
body{font:16px/1.5 var(--font);max-width:68rem;margin:0 auto;padding:2rem 1.25rem 4rem;background:var(--bg);
color:var(--ink);overflow-wrap:anywhere}
h1{font-size:clamp(1.6rem,5vw,2.3rem);line-height:1.2;letter-spacing:-.02em;margin:.1rem 0 .35rem}
h2{font-size:1.25rem;letter-spacing:-.01em;margin:3rem 0 .25rem}
p{margin:.2rem 0 .8rem;color:var(--muted);max-width:44rem}
.kicker{font-size:.8rem;font-weight:600;letter-spacing:.08em;text-transform:uppercase;margin:0}
.cards,.panels{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
.panels.alone{grid-template-columns:minmax(0,40rem)}
.cards{margin:1.5rem 0}
.card{background:var(--card);border-radius:.8rem;padding:1.1rem 1.3rem;border-left:.3rem solid var(--c,var(--s0))}
.card p{margin:0;font-size:.9rem}
.card .figure{font-size:clamp(1.7rem,6vw,2.4rem);line-height:1.25;color:var(--muted);
font-variant-numeric:tabular-nums;letter-spacing:-.02em;white-space:nowrap}
.card strong{color:var(--ink);font-weight:750}
.up{color:var(--good);font-weight:600}.down{color:var(--worse);font-weight:600}
figure{margin:.6rem 0;min-width:0}
figcaption{font-size:.92rem;font-weight:600;margin-bottom:.3rem}
figure svg{display:block;width:100%;max-width:40rem;height:auto;overflow:visible}
.areas rect{fill:var(--ink);fill-opacity:0}.areas rect:hover{fill-opacity:.1}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.4rem 0 .6rem;padding:0;font-size:.9rem}
.legend li::before{content:"";display:inline-block;width:1.5rem;margin-right:.5rem;vertical-align:middle;
border-top:.2rem var(--line,solid) var(--c)}
.scroll{overflow-x:auto;margin:.6rem 0 1rem}
table{border-collapse:collapse;font-size:.93rem;min-width:min(100%,40rem)}
th,td{padding:.4rem 1.4rem .4rem 0;border-bottom:1px solid var(--grid);text-align:right;vertical-align:top;
font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}
th{font-weight:600;color:var(--muted);font-size:.85rem}
table{overflow-wrap:normal}th,td{white-space:nowrap}
td:first-child,.words td{white-space:normal;overflow-wrap:break-word}
td:first-child{min-width:9rem;max-width:24rem}
.words td,.words th{text-align:left}.words td{min-width:10rem}
.words td:first-child{color:var(--muted);min-width:6.5rem}
details{margin-top:1.5rem}summary{cursor:pointer;font-weight:600}
pre{background:var(--card);border-radius:.5rem;padding:1rem;overflow-x:auto;font-size:.8rem;line-height:1.45}
code{font-size:.88em;background:var(--card);border-radius:.3rem;padding:.1em .35em}
#value{position:fixed;display:none;pointer-events:none;background:var(--ink);color:var(--bg);font-size:.82rem;
padding:.25rem .6rem;border-radius:.4rem;max-width:min(20rem,90vw);z-index:1}
@media (max-width:34rem){body{padding:1.2rem 1rem 3rem}th,td{padding-right:.6rem}}
@media print{details{display:none}body{max-width:none}}
"""

SCRIPT = """
(function(){var box=document.createElement("div");box.id="value";document.body.append(box);
document.querySelectorAll(".areas title").forEach(function(t){t.parentNode.dataset.value=t.textContent;t.remove()});
function show(e){var text=e.target.dataset&&e.target.dataset.value;
box.style.display=text?"block":"none";if(!text)return;
box.textContent=text;var w=box.offsetWidth,x=Math.min(Math.max(4,e.clientX-w/2),innerWidth-w-4);
box.style.left=x+"px";box.style.top=Math.max(4,e.clientY-box.offsetHeight-14)+"px"}
document.addEventListener("pointermove",show);document.addEventListener("pointerdown",show)})();
"""
