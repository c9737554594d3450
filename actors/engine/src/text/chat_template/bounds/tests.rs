use std::fmt::Write;

use super::*;
use crate::text::{ChatTemplate, Conversation};
use ingle_protocol::wire::v2::{Message, Role};

/// What a template makes of two messages, or why not.
fn render(source: &str) -> Result<String, String> {
    let template = ChatTemplate::new(source, "<s>", "</s>")?;
    let message = |role, content: &str| Message { role, content: content.into(), extra: vec![] };
    let messages = [message(Role::System, "be kind"), message(Role::User, "hello")];
    let conversation = Conversation::new(&messages, b"").map_err(|error| error.0)?;
    template.render(&conversation).map_err(|error| error.0)
}

fn refused(source: &str, why: &str) {
    let error = render(source).expect_err(source);
    assert!(error.contains(why), "{source}: {error}");
}

/// Each way to put a namespace into itself, with each way to walk it.
#[test]
fn no_namespace_holds_itself() {
    let ways = [
        "{% set ns.a = ns %}",
        "{% set ns.a = [ns] %}",
        "{% set ns.a = (1, ns) %}",
        "{% set ns.a = {'b': ns} %}",
        "{% set ns.a = dict(b=ns) %}",
        "{% set ns.a = [[1], [2]] + [ns] %}",
        "{% set ns.a = {'b': [{'c': ns}]} %}",
        "{% set (ns.a, ns.b) = (1, ns) %}",
        "{% set ns.a, ns.b = 1, ns %}",
        "{% set ns.a | default(ns, true) %}{% endset %}",
        "{% set ns.a = namespace(b=ns) %}",
        "{% set other = namespace(b=ns) %}{% set ns.a = other %}",
        "{% set other = namespace() %}{% set other.b = ns %}{% set ns.a = other %}",
        "{% for x in [1] %}{% set ns.a = loop %}{% endfor %}",
        "{% set ns.a = ns | items | list %}{% set ns.a = ns if true %}",
        "{% macro m(x) %}{% set ns.a = x %}{% endmacro %}{{ m(ns) }}",
        "{% macro m(x) %}{% set x.a = x %}{{ caller() }}{% endmacro %}{% call m(ns) %}{% endcall %}",
    ];
    let walks = ["{{ ns }}", "{{ ns | tojson }}", "{{ ns ~ 1 }}", "{{ [ns.a] == [ns.a] }}", "{{ ns.a | string }}"];
    for way in ways {
        for walk in walks {
            refused(&format!("{{% set ns = namespace() %}}{way}{walk}"), "cannot hold");
        }
    }
    // `items` alone copies what is there.
    let copied = "{% set ns = namespace(x=1) %}{% set ns.a = ns | items | list %}{{ ns.a }}";
    assert_eq!(render(copied).unwrap(), "[('x', 1)]");
}

/// What templates do use namespaces for.
#[test]
fn namespaces_hold_what_does_not_change() {
    let source = "{% set ns = namespace(found=false, list=[], n=0) %}\
        {% for m in messages %}{% set ns.list = ns.list + [m.content] %}{% set ns.n = ns.n + loop.index * 2 %}\
        {% set ns.last = m %}{% if m.role == 'user' %}{% set ns.found = true %}{% endif %}{% endfor %}\
        {{ ns.found }} {{ ns.list | join('|') }} {{ ns.n }} {{ ns.last['content'] }} {{ ns.list[::-1][0] }}";
    assert_eq!(render(source).unwrap(), "True be kind|hello 6 hello hello");
}

#[test]
fn control_flow_survives_the_checks() {
    let cases = [
        ("{% for a in [1, 2, 3] %}{% if a == 2 %}{% continue %}{% endif %}{{ a }},{% else %}none{% endfor %}", "1,3,"),
        ("{% for a in [] %}{{ a }}{% else %}none{% endfor %}", "none"),
        ("{% for a in [3, [4, [5]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}", "345"),
        (
            "{% macro m(a, b=[1] * 2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m('x') %}y{% endcall %}",
            "x[1, 1]y",
        ),
        ("{{ 1 < 2 < 3 }} {{ 3 > 2 > 2 }} {{ 2 * 3 ** 2 * 2 }} {{ 'ab' * 2 }}", "True False 36 abab"),
        ("{{ 'a' in 'abc' and 'x' not in ['y'] or false }}", "True"),
        ("{% set x %}a{% filter upper %}b{% endfilter %}{% endset %}{{ x }}", "aB"),
        ("{% with a = [1, 2, 3][1:] %}{{ a }}{{ a[0] }}{% endwith %}", "[2, 3]2"),
        ("{{ range(5)[::2] | list }} {{ dict(a=1, **{'b': 2}) }}", "[0, 2, 4] {'a': 1, 'b': 2}"),
        ("{{ '%s-%s' | format(*['a', 'b']) }} {{ {'a': 1}.items() | list }}", "a-b [('a', 1)]"),
        ("{% block b %}{{ messages | length }}{% endblock %}{{ self.b() }}", "22"),
        ("{% set a, b = [1, 2] | reverse %}{{ a }}{{ b }}{{ (a, b) }}", "21(2, 1)"),
        ("{{ [[1, 2], [3]] | sum(start=[]) }} {{ 'a,b'.split(',') }}", "[1, 2, 3] ['a', 'b']"),
    ];
    for (source, expected) in cases {
        assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
    }
}

/// Lists of the same list twice, of the same list twice, and so on.
#[test]
fn what_is_there_many_times_is_weighed_each_time() {
    let doubled = |first: &str, step: &str| {
        let mut source = format!("{{% set a = {first} %}}");
        (0..40).for_each(|_| write!(source, "{{% set a = {step} %}}").unwrap());
        source
    };
    for step in ["[a, a]", "(a, a)", "{'x': a, 'y': a}", "dict(x=a, y=a)", "[a] * 2", "a + a", "a | zip(a) | list"] {
        let made = doubled("['x']", step);
        for walk in
            ["{{ a }}", "{{ a | tojson }}", "{{ a ~ '' }}", "{{ a == [a] }}", "{{ a | string }}", "{{ {a: 1} }}"]
        {
            refused(&format!("{made}{walk}"), "too large");
        }
    }
    // Without a variable.
    let nested: String = (0..40).map(|n| format!("{{% for a{} in [[a{n}, a{n}]] %}}", n + 1)).collect();
    refused(&format!("{{% set a0 = 1 %}}{nested}{{{{ a40 }}}}{}", "{% endfor %}".repeat(40)), "too large");
    refused("{{ [1] * 1000000000000 }}", "too large");
    refused("{{ [1] * 1000000000000 == [1] * 1000000000000 }}", "too large");
    refused("{{ [[[1] * 1000] * 1000] * 1000 }}", "too large");
    refused(&format!("{{% set s = 'x' * 1000000 %}}{{{{ [s]{} }}}}", " * 1000"), "too large");
}

#[test]
fn strings_that_double_come_to_an_end() {
    let grow = |step: &str| {
        format!(
            "{{% set ns = namespace(s='x') %}}{{% for i in range(99999) %}}{step}{{% endfor %}}{{{{ ns.s | length }}}}"
        )
    };
    for step in [
        "{% set ns.s = ns.s ~ ns.s %}",
        "{% set ns.s = ns.s + ns.s %}",
        "{% set ns.s = ns.s * 2 %}",
        "{% set ns.s = [ns.s, ns.s] | join %}",
        "{% set ns.s = ns.s.replace('x', 'xx') %}",
        "{% set ns.s = ns.s | replace('x', 'xx') %}",
        "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}",
        "{% set ns.s = '%s%s' | format(ns.s, ns.s) %}",
        "{% set ns.s = [ns.s, ns.s] | tojson %}",
        "{% set ns.s = ns.s | indent(999) ~ '\\n' ~ ns.s %}",
    ] {
        refused(&grow(step), "too ");
    }
    for wide in [
        "{{ '{:>999999999999}'.format(1) }}",
        "{{ '{:.999999999999f}'.format(1.5) }}",
        "{{ '%999999999999d' | format(1) }}",
        "{{ '%.99999999999999999999999f' | format(1.5) }}",
        "{% set s = 'x' * 1000000 %}{{ ('{0}' * 1000000).format(s) }}",
        "{% set s = 'x' * 1000000 %}{{ ('%(a)s' * 1000000) | format({'a': s}) }}",
        "{% set s = 'x' * 1000000 %}{{ ('%(a)s' * 1000000) | format(a=s) }}",
        "{{ ('x ' * 100000000).split() }}",
        "{{ ('x\\n' * 100000000).splitlines() }}",
        "{{ [1] | batch(999999999999, 1) }}",
        "{{ [1] | slice(999999999999, 1) }}",
    ] {
        refused(wide, "too ");
    }
    assert_eq!(render("{{ '{:>4}|{a}'.format(1, a='b') }}{{ '%3d|%s' | format(1, 'x') }}").unwrap(), "   1|b  1|x");
}

#[test]
fn what_nests_deep_is_refused() {
    let grow = |step: &str| {
        format!("{{% set ns = namespace(s=[1, 2]) %}}{{% for i in range(99999) %}}{step}{{% endfor %}}{{{{ ns.s }}}}")
    };
    for step in ["{% set ns.s = [ns.s] %}", "{% set ns.s = {'a': ns.s} %}", "{% set ns.s = ns.s | batch(2) | list %}"] {
        refused(&grow(step), "too deep");
    }
    // Views of views are made into lists at once.
    for step in ["ns.s[0:]", "ns.s | reverse", "ns.s * 1", "ns.s[::-1]", "ns.s + []", "ns.s | chain"] {
        let step = format!("{{% set ns.s = {step} %}}");
        assert!(render(&grow(&step).replace("99999", "20000")).is_ok_and(|text| text.len() == 6), "{step}");
    }
    refused(&format!("{{{{ 1{} }}}}", " + 1".repeat(60_000)), "words and signs");
    refused(&format!("{{{{ a{} }}}}", ".a".repeat(100_000)), "words and signs");
    refused(&format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(10_000)), "elif");
    refused(&"x".repeat(MAX_SOURCE + 1), "bytes");
    refused("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion");
}

/// Within the stack of the smallest threads that we have.
#[test]
fn the_deepest_that_is_let_pass_fits_the_stack() {
    let sources = [
        format!("{{{{ 1{} }}}}", " + a".repeat(MAX_TAG / 2 - 2)),
        format!("{{{{ a{} }}}}", ".a".repeat(MAX_TAG / 2 - 2)),
        format!("{{{{ a{} }}}}", "|list".repeat(MAX_TAG / 2 - 2)),
        format!("{{{{ {}a }}}}", "not ".repeat(MAX_TAG - 3)),
        format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(MAX_ELIF)),
        format!("{}{}", "{% for a in [1] %}".repeat(140), "{% endfor %}".repeat(140)),
        format!(
            "{{% set ns = namespace(s=[]) %}}{{% for i in range({}) %}}{{% set ns.s = [ns.s] %}}{{% endfor %}}{{{{ ns.s }}}}{{{{ ns.s | tojson(indent=2) }}}}{{{{ ns.s == [ns.s] }}}}{{{{ {{ns.s: 1}} }}}}",
            MAX_DEPTH - 4
        ),
        "{% macro m(x) %}{{ caller() if caller }}{% call m(x) %}{{ x }}{% endcall %}{% endmacro %}{{ m(1) }}".into(),
    ];
    let run = move || sources.iter().for_each(|source| drop(render(source)));
    std::thread::Builder::new().stack_size(1 << 20).spawn(run).unwrap().join().unwrap();
}

#[test]
fn loops_cannot_keep_themselves_or_divide_by_zero() {
    refused("{% for a in [1] %}{{ loop.changed(loop) }}{% endfor %}", "changed");
    refused("{% for a in [1] %}{{ loop.cycle() }}{% endfor %}", "cycle");
    refused("{% for a in [1] %}{{ loop.cycle(*[]) }}{% endfor %}", "cycle");
    assert_eq!(render("{% for a in [1, 2] %}{{ loop.cycle('a', 'b') }}{% endfor %}").unwrap(), "ab");
}
