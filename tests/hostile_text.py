"""Text of others that would be markup, a template or a header if a card took it as it is."""

EVIL = (
    "a|b `c` | d |\n| e | f |",
    "<script>alert(1)</script></td>",
    "\n---\nlicense: mit\n---\n# title",
    "[a](http://b) ![a](b) **c** _d_ ~~e~~ @me",
    "{{ 7*7 }} {% raw %} {# #} \\| &lt; &#60;",
    "\n```\n$x$\n- item\n1. item",
)
