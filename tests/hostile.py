"""Texts that a model could write to harm whoever reads them. A payload that runs sets ``window.qsHit``."""

HIT = "window.qsHit=1"
HOSTILE = (
    # tags that run something
    f"<script>{HIT}</script>", f"</script><script>{HIT}</script>", f"<ScRiPt >{HIT}</sCrIpT>", f"<img src=x onerror={HIT}>",
    f"<img src=x onerror='{HIT}'", f"<svg onload={HIT}>", f"<svg><animate onbegin={HIT} attributeName=x dur=1s>",
    f"<body onload={HIT}>", f"<details open ontoggle={HIT}>", f"<video><source onerror={HIT}></video>",
    f"<audio src=x onerror={HIT}>", f"<input autofocus onfocus={HIT}>", f"<iframe srcdoc='<script>parent.{HIT}</script>'>",
    f"<iframe src=javascript:parent.{HIT}>", f"<object data=javascript:{HIT}>", f"<embed src=javascript:{HIT}>",
    f"<math><mtext><script>{HIT}</script>", f"<template><script>{HIT}</script></template>", f"<!--><script>{HIT}</script>-->",
    f"<![CDATA[<script>{HIT}</script>]]>", f"<noscript><p title='</noscript><img src=x onerror={HIT}>'>",
    f"<marquee onstart={HIT}>x</marquee>", f"<a href=javascript:{HIT} autofocus tabindex=1 onfocus={HIT}>click</a>",
    f"<form action=javascript:{HIT}><button autofocus>go", f"<xss style=animation:x onanimationstart={HIT}>",
    # out of an attribute, a tag, the page
    f"' onmouseover='{HIT}", f'" onmouseover="{HIT}', f"'><img src=x onerror={HIT}>", f'"><svg/onload={HIT}>',
    f"` onerror=`{HIT}", "</div></td></tr></table></div>", "<div style='position:fixed;inset:0;background:white;z-index:99999'>",
    "</style><style>*{display:none !important}</style>", "<style>body{visibility:hidden}</style>", "<plaintext>", "<!-- ",
    "<textarea>", "<title>", "<base href=//example.invalid/>", "<meta http-equiv=refresh content='0;url=data:text/html,x'>",
    "<link rel=stylesheet href=//example.invalid/x.css>", "<img src=//example.invalid/pixel.png>",
    "style=background:url(//example.invalid/y.png)", "expression(alert(1))", "&lt;script&gt;", "&#60;script&#62;alert(1)",
    "&#x3c;img src=x onerror=alert(1)&#x3e;", "\\u003cscript\\u003e", "%3Cscript%3E", "{{constructor.constructor('alert(1)')()}}",
    "${alert(1)}", "<%= 7 * 7 %>", "{% raw %}", f"<button formaction=javascript:{HIT}>go</button>", "<base target=_blank>", "]]>",
    # addresses
    f"javascript:{HIT}", f"data:text/html,<script>{HIT}</script>", f"[click](javascript:{HIT})",
    "![pixel](http://example.invalid/z.png)", "<http://example.invalid/>", "file:///etc/passwd",
    # markdown and formulas
    "# heading\n- list\n```\ncode", "$\\phantom{hidden}$", "$$\\href{javascript:window.qsHit=1}{x}$$", "\\(\\text{gone}\\)",
    "\\[\\color{white}{unseen}\\]", "$\\require{html}\\style{display:none}{gone}$", "\\begin{align}x\\end{align}",
    # terminals
    "\x1b[31mred\x1b[0m", "\x1b[2J\x1b[H", "\x1b]0;title\x07", "\x1b]8;;http://example.invalid\x1b\\link\x1b]8;;\x1b\\", "a\x08\x08b",
    "\rover the line", "\x9b31m",
    # text that turns, hides or piles up
    "a\u202eb\u2066c", "\u200f\u05d0\u05d1 12", "\u2067\u2068\u2069", "no\u200bwidth\u200d\ufeff", "soft\u00adhyphen", "\u2028\u2029",
    "\u3164\u115f\u2800\u00a0\u3000", "tag\U000e0041\U000e0042", "hidden\ufe0f\U000e0101\ufe01", "z" + "\u0316\u0301\u0489" * 40,
    "\u0430\u0440\u0440\u04cf\u0435", "x\x00y", "\x00", "\ud800", "\udfff\ud800", "\ufffe\uffff", "\U0001f600\U0001f468\u200d\U0001f469",
    # sizes and nothing
    "", " ", "   ", "\n\n\n", "\t", "line\nbreak\ttab", "w" * 1_000_000, "word " * 200_000, "<b>" * 300_000,
)  # fmt: skip
