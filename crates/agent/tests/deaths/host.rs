//! The processes beside the victims: the host of a broker, and its guardian.

use std::fs::File;
use std::io::{BufRead as _, Write as _};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use broker::{Broker, CheckChoice, Judge, Scope, Settings};
use kernel::{Pid, Pidfd, Range, signals};

/// Trusts everybody.
#[derive(Debug)]
struct Trusting;

impl Judge for Trusting {
    fn program(&self, _pid: Pid, _own: &[Range]) -> Result<(), String> {
        Ok(())
    }

    fn admits(&self, _pid: Pid, _file: Option<&File>) -> Result<(), String> {
        Ok(())
    }
}

/// Serves a partition until its standard input ends. Says how victims find it.
pub(crate) fn broker(all: bool) {
    kernel::task::set_child_subreaper(true).unwrap();
    let check = match std::env::var("CHECK").as_deref() {
        Ok("collapse") => CheckChoice::Collapse,
        _ => CheckChoice::Auto,
    };
    let settings = Settings {
        // Long cycles: victims that fill their memory together are to be due together.
        stable: Some(Duration::from_millis(800)),
        check,
        scope: if all { Scope::All(Arc::new(Trusting)) } else { Scope::Marked },
        // Whatever else the machine does meanwhile.
        runnable_per_cpu: u64::MAX,
        guardian: Some((std::env::current_exe().unwrap(), vec!["--guardian".to_owned()])),
        ..Settings::default()
    };
    let broker = Broker::start(settings).unwrap();
    let token = broker.token();
    println!("{}:{:016x}{:016x}{}", broker.name(), token.0, token.1, if all { ":all" } else { "" });
    std::io::stdout().flush().unwrap();
    std::thread::spawn(|| {
        loop {
            // Helpers that have ended are children of this process.
            signals::reap_others(Pid(0));
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    for line in std::io::stdin().lock().lines() {
        match line.unwrap().as_str() {
            "summary" => println!("{}", serde_json(&broker.summary().unwrap())),
            _ => break,
        }
        std::io::stdout().flush().unwrap();
    }
}

fn serde_json(summary: &broker::Summary) -> String {
    format!(
        "{} {} {} {} {} {:?}",
        summary.processes, summary.merges, summary.retaken, summary.pages_sharing, summary.pages_unfit, summary.refused
    )
}

/// The guardian: the broker's last argument is the number of its descriptor.
pub(crate) fn guardian(arguments: &[String]) {
    let number = arguments.last().unwrap().parse().unwrap();
    let socket: OwnedFd = Pidfd::open(Pid::this()).unwrap().getfd(number).unwrap();
    broker::guardian::run(socket);
}
