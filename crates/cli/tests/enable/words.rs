//! Which mappings: `--vma`, `--exclude`, `--later`, in each form, and what a second call finds.

use crate::stand::{Running, pagefold, told};

fn address(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap()
}

#[test]
fn a_whole_process_and_back_and_each_once_more() {
    let mut target = Running::python("serve()");
    let pid = target.text();
    let first = pagefold(&["enable", &pid]);
    assert_eq!((first.status, first.outcome(target.pid())), (Some(0), "done"), "{first:?}");
    assert!(target.is_on() && target.marked().contains(&"[stack]".to_owned()), "the stack of an executed program too");
    let later = address(&target.ask("area(4)"));
    assert!(target.is_marked(later), "what is mapped later");
    assert!(!first.notes.contains("COMMAND"), "a document, and nothing beside it: {}", first.notes);
    assert!(told(&["enable", &pid]).contains("was enabled"));
    let again = pagefold(&["enable", &pid]);
    assert_eq!((again.status, again.outcome(target.pid())), (Some(0), "already"));
    assert_eq!(again.of(target.pid())["injections"], 0);
    let back = pagefold(&["disable", &pid]);
    assert_eq!((back.status, back.outcome(target.pid())), (Some(0), "done"), "{back:?}");
    assert!(!target.is_on() && target.marked().is_empty());
    assert_eq!(pagefold(&["disable", &pid]).outcome(target.pid()), "already");
    assert_eq!(target.ask("6 * 7"), "42");
}

#[test]
fn only_the_named_mappings() {
    let mut target = Running::python("serve()");
    let pid = target.text();
    let (first, other) = (address(&target.ask("area(64)")), address(&target.ask("area(64, b'y')")));
    assert_eq!(pagefold(&["enable", &pid, "--vma", "heap"]).outcome(target.pid()), "done");
    assert_eq!(target.marked(), ["[heap]"]);
    assert_eq!(pagefold(&["enable", &pid, "--vma", "stack"]).outcome(target.pid()), "done");
    assert_eq!(target.marked(), ["[heap]", "[stack]"]);
    // Half of an area: exactly the named pages.
    let page = kernel::page_size();
    let half = format!("{:x}-{:x}", first + 8 * page, first + 40 * page);
    let said = pagefold(&["enable", &pid, "--vma", &half]);
    assert_eq!(said.outcome(target.pid()), "done", "{said:?}");
    assert!(!target.is_marked(first) && !target.is_marked(first + 7 * page) && !target.is_marked(first + 40 * page));
    assert!(target.is_marked(first + 8 * page) && target.is_marked(first + 39 * page) && !target.is_marked(other));
    // By a name with a star: private mappings of the library, its data.
    assert_eq!(pagefold(&["enable", &pid, "--vma", "libc.so*"]).outcome(target.pid()), "done");
    let marked = target.marked();
    assert!(marked.iter().any(|name| name.contains("libc.so")) && !marked.iter().any(|name| name.contains("libm.so")));
    assert!(!target.is_on(), "the switch is for whole processes");
    let later = address(&target.ask("area(4096)"));
    assert!(!target.is_marked(later));
    // And back, piece by piece.
    assert_eq!(pagefold(&["disable", &pid, "--vma", "libc.so*", "--vma", &half]).outcome(target.pid()), "done");
    assert_eq!(target.marked(), ["[heap]", "[stack]"]);
    assert_eq!(pagefold(&["disable", &pid, "--exclude", "heap"]).outcome(target.pid()), "done");
    assert_eq!(target.marked(), ["[heap]"]);
    let none = pagefold(&["enable", &pid, "--vma", "no-such-thing"]);
    assert_eq!((none.status, none.outcome(target.pid())), (Some(1), "nothing"));
    let notes = told(&["enable", &pid, "--vma", "no-such-thing"]);
    assert!(notes.contains("no-such-thing is the name of no mapping"), "{notes}");
}

#[test]
fn what_is_excluded_stays_so_whatever_is_mapped_later() {
    let mut target = Running::python("serve()");
    let pid = target.text();
    let said = pagefold(&["enable", &pid, "--exclude", "heap", "--exclude", "stack"]);
    assert_eq!(said.outcome(target.pid()), "done", "{said:?}");
    let excluded = |marked: &[String]| marked.iter().any(|name| name == "[heap]" || name == "[stack]");
    assert!(!excluded(&target.marked()) && target.marked().len() > 5 && !target.is_on());
    let notes = told(&["enable", &pid, "--exclude", "heap", "--exclude", "stack"]);
    assert!(notes.contains("what is mapped from now on is not merged"), "{notes}");
    // A heap that grows would get a marked part if the switch were on.
    target.ask("kept.append([bytearray(2000) for n in range(2000)])");
    assert!(!excluded(&target.marked()));
    let said = pagefold(&["enable", &pid, "--exclude", "heap", "--later"]);
    assert_eq!(said.outcome(target.pid()), "done", "{said:?}");
    assert!(target.is_on() && target.marked().contains(&"[stack]".to_owned()));
    let later = address(&target.ask("area(4)"));
    assert!(target.is_marked(later));
    // With the switch on already, excluding turns it off.
    let said = pagefold(&["enable", &pid, "--exclude", "anon"]);
    assert_eq!(said.outcome(target.pid()), "done", "{said:?}");
    assert!(!target.is_on() && !target.is_marked(later) && target.marked().contains(&"[heap]".to_owned()));
}

#[test]
fn wrong_words_are_wrong_usage() {
    for (arguments, said) in [
        (&["enable", "1", "--vma", "2000-1000"][..], "ends before"),
        (&["enable", "1", "--vma", "1-2"], "page boundaries"),
        (&["enable", "1", "--exclude", ""], "must be heap"),
        (&["enable"], "required"),
        (&["enable", "--children"], "required"),
        (&["enable", "0"], "not in 1"),
        (&["enable", "x"], "invalid"),
        (&["enable", "1", "--later"], "required"),
        (&["enable", "1", "--timeout", "-1"], "seconds"),
        (&["disable", "1", "--later"], "unexpected"),
    ] {
        let answer = pagefold(arguments);
        assert_eq!(answer.status, Some(2), "{arguments:?}");
        assert!(answer.notes.contains(said), "{arguments:?}: {}", answer.notes);
    }
}
