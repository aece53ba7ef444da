//! Causes of the whole host that need no merging.

use std::process::Command;

use ksm::KsmSysfs;

use crate::stand::{Host, PAGEFOLD, Said, Stage, apart};

#[test]
fn a_kernel_without_ksm() {
    let Some(_host) = Host::lock() else { return };
    let said = Said::by(&mut apart(&["--mount"], "mount -t tmpfs none /sys/kernel/mm/ksm &&"));
    said.host("blocks", "ksm-missing", "KSM is not built into this kernel");
    // This kernel has the prctl, which gives it away.
    said.host("blocks", "ksm-missing", "something is mounted over its directory");
    assert_eq!((said.findings.len(), said.status), (1, Some(0)), "{said:?}");
    Said::of_the_host().no("ksm-missing");
}

#[test]
fn settings_that_are_mounted_read_only() {
    let Some(host) = Host::lock() else { return };
    host.set(&[("run", 0)]);
    let bound = "mount --bind /sys/kernel/mm/ksm /sys/kernel/mm/ksm && mount -o remount,bind,ro /sys/kernel/mm/ksm &&";
    let said = Said::by(&mut apart(&["--mount"], bound));
    said.host("hampers", "read-only", "mounted read-only");
    said.host("blocks", "ksm-off", "run is 0");
    let said = Said::of_the_host();
    said.no("read-only");
    said.no("not-writable");
}

#[test]
fn settings_of_another_user() {
    let Some(_host) = Host::lock() else { return };
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups", PAGEFOLD, "doctor", "--json"]);
    let said = Said::by(&mut nobody);
    said.host("hampers", "not-writable", "belong to root");
    // And processes of root cannot be looked at.
    said.host("note", "marks-unseen", "of other users");
}

#[test]
fn the_switch() {
    let Some(host) = Host::lock() else { return };
    host.set(&[("run", 0)]);
    let said = Said::of_the_host();
    said.host("blocks", "ksm-off", "switched off (run is 0)");
    assert_eq!(said.findings[0]["severity"], "blocks", "what blocks comes first");
    host.set(&[("run", 2)]);
    Said::of_the_host().host("blocks", "ksm-unmerging", "run is 2");
    host.set(&[("run", 1)]);
    let said = Said::of_the_host();
    said.no("ksm-off");
    said.no("ksm-unmerging");
}

#[test]
fn the_rate() {
    let Some(host) = Host::lock() else { return };
    host.fresh();
    host.write("advisor_mode", "none");
    host.set(&[("pages_to_scan", 100), ("sleep_millisecs", 20)]);
    let marked = Stage::new("a = area(25600); mergeable(a); fill(a); stay()");
    let said = Said::of_the_host();
    // 100 MiB at 19.5 MiB/s.
    said.host("note", "scan-rate", "19.5 MiB a second");
    let known: Vec<_> = said.findings.iter().filter(|found| found["code"] == "scan-rate").collect();
    let cause = known[0]["cause"].as_str().unwrap();
    assert!(["takes about 5", "takes about 6", "takes about 7"].iter().any(|words| cause.contains(words)), "{cause}");
    drop(marked);
    host.set(&[("pages_to_scan", 0)]);
    Said::of_the_host().host("blocks", "scan-nothing", "pages_to_scan is 0");
    host.set(&[("pages_to_scan", 5000)]);
    let said = Said::of_the_host();
    said.no("scan-nothing");
    said.no("scan-rate");
}

#[test]
fn the_advisor_that_overrides() {
    let Some(host) = Host::lock() else { return };
    host.write("advisor_mode", "none");
    host.set(&[("pages_to_scan", 4321)]);
    Said::of_the_host().no("advisor");
    host.write("advisor_mode", "scan-time");
    // What is said about it is so.
    assert!(KsmSysfs::host().write("pages_to_scan", "4321").is_err());
    Said::of_the_host().host("note", "advisor", "(now 500, ");
}

#[test]
fn nobody_is_marked() {
    let Some(_host) = Host::lock() else { return };
    // Whoever else may be marked on this machine is not seen in there.
    let own = ["--pid", "--fork", "--mount-proc"];
    Said::by(&mut apart(&own, "")).host("blocks", "nothing-marked", "no process has mergeable memory");
    let foreign = Said::by(&mut apart(&["--pid", "--fork"], ""));
    foreign.host("note", "marks-unseen", "of another PID namespace");
    foreign.no("nothing-marked");
    let _marked = Stage::new("a = area(16); mergeable(a); fill(a); stay()");
    Said::of_the_host().no("nothing-marked");
}

#[test]
fn layouts() {
    let Some(_host) = Host::lock() else { return };
    let random = std::fs::read_to_string("/proc/sys/kernel/randomize_va_space").unwrap();
    assert_ne!(random.trim(), "0", "this machine draws no addresses at random");
    let mut pair = [0, 1].map(|_| Stage::new("prctl(1); print('here'); print(sys.executable); stay()"));
    let said = Said::of_the_host();
    said.host("hampers", "layout", "2 processes of ");
    said.host("hampers", "layout", "have 2 address-space layouts");
    assert!(pair[0].line().contains("python"));
    drop(pair);
    // Forks have one layout.
    let forks = Stage::new("prctl(1); p = os.fork(); stay() if p else sys.stdin.read()");
    let said = Said::of(&[forks.pid()]);
    said.no("layout");
    said.no("nothing-marked");
}

#[test]
fn what_people_read() {
    let Some(host) = Host::lock() else { return };
    host.set(&[("run", 0)]);
    let output = Command::new(PAGEFOLD).arg("doctor").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    let mut lines = text.lines().skip_while(|line| !line.ends_with("[ksm-off]"));
    assert_eq!(lines.next(), Some("  blocks   host  KSM is built in but switched off (run is 0) [ksm-off]"));
    assert!(lines.next().unwrap().starts_with("                 -> echo 1 > /sys/kernel/mm/ksm/run, or "), "{text}");
    // The probe follows.
    assert!(lines.any(|line| line.contains("PAGEMAP_SCAN")), "{text}");
    assert!(lines.any(|line| line.starts_with("  can   driving kernel KSM")), "{text}");
}
