//! Workers as those who start them see them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use kernel::Pid;

use super::layout::Layout;
use super::process::{Answer, Order};
use super::touch::Touched;

/// A group of workers, ended when it goes.
#[derive(Debug)]
pub struct Fleet {
    workers: Vec<Worker>,
}

#[derive(Debug)]
struct Worker {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Fleet {
    /// Starts the workers and waits until they have filled their memory. `prepare` is called for each command.
    ///
    /// # Errors
    /// When one cannot be started or has no memory.
    pub fn start(layout: Layout, prepare: impl Fn(&mut Command)) -> Result<Self> {
        let mut fleet = Self { workers: Vec::new() };
        for worker in 0..layout.workers {
            let mut command = Command::new("/proc/self/exe");
            command.arg("worker");
            for (name, value) in [
                ("--pages", layout.pages),
                ("--run", layout.run),
                ("--copies", layout.copies),
                ("--workers", layout.workers),
                ("--worker", worker),
            ] {
                command.arg(name).arg(value.to_string());
            }
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            prepare(&mut command);
            let mut child = command.spawn().context("cannot start a worker")?;
            let orders = child.stdin.take();
            let answers = BufReader::new(child.stdout.take().context("a worker without a pipe")?);
            fleet.workers.push(Worker { child, orders, answers });
        }
        for worker in &mut fleet.workers {
            worker.done()?;
        }
        Ok(fleet)
    }

    /// Their process ids, in order.
    pub fn pids(&self) -> impl Iterator<Item = Pid> {
        self.workers.iter().map(|worker| Pid(worker.child.id().cast_signed()))
    }

    /// All of them hand their memory over.
    ///
    /// # Errors
    /// When one cannot.
    pub fn hand_over(&mut self) -> Result<()> {
        self.workers.iter_mut().try_for_each(|worker| {
            worker.tell(Order::HandOver)?;
            worker.done()
        })
    }

    /// Words that are not what they should be.
    ///
    /// # Errors
    /// When a worker is gone.
    pub fn wrong_words(&mut self) -> Result<u64> {
        self.workers.iter_mut().try_fold(0, |sum, worker| {
            worker.tell(Order::Verify)?;
            match worker.answer()? {
                Answer::Wrong(words) => Ok(sum + words),
                other => bail!("a worker answered {other:?}"),
            }
        })
    }

    /// Lets each worker write to its pages, up to so many; nanoseconds of each write.
    ///
    /// # Errors
    /// When a worker is gone.
    pub fn write(&mut self, pages: u64) -> Result<Vec<u64>> {
        let mut all = Vec::new();
        for worker in &mut self.workers {
            worker.tell(Order::Write { pages })?;
            match worker.answer()? {
                Answer::Wrote(nanoseconds) => all.extend(nanoseconds),
                other => bail!("a worker answered {other:?}"),
            }
        }
        Ok(all)
    }

    /// Lets the first worker read and write its pages, calls `meanwhile` again and again until it has finished, and
    /// returns what it met.
    ///
    /// # Errors
    /// When the worker is gone, or what `meanwhile` says.
    pub fn touch(
        &mut self,
        milliseconds: u64,
        writes: u64,
        mut meanwhile: impl FnMut() -> Result<()>,
    ) -> Result<Touched> {
        let worker = self.workers.first_mut().context("there is no worker")?;
        worker.tell(Order::Touch { milliseconds, writes })?;
        let answer = std::thread::scope(|scope| {
            let answer = scope.spawn(|| worker.answer());
            let mut result = Ok(());
            while result.is_ok() && !answer.is_finished() {
                result = meanwhile();
            }
            let answer = answer.join().map_err(|_panic| anyhow::anyhow!("a thread that waited has panicked"))?;
            result.and(answer)
        })?;
        match answer {
            Answer::Touched(touched) => Ok(*touched),
            other => bail!("a worker answered {other:?}"),
        }
    }
}

impl Worker {
    fn tell(&mut self, order: Order) -> Result<()> {
        let orders = self.orders.as_mut().context("the worker has been told to end")?;
        let mut line = serde_json::to_vec(&order)?;
        line.push(b'\n');
        orders.write_all(&line).context("a worker is gone")
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        if self.answers.read_line(&mut line).context("cannot hear a worker")? == 0 {
            bail!("a worker has ended: {:?}", self.child.try_wait());
        }
        match serde_json::from_str(&line)? {
            Answer::Failed(reason) => bail!("a worker failed: {reason}"),
            answer => Ok(answer),
        }
    }

    fn done(&mut self) -> Result<()> {
        match self.answer()? {
            Answer::Done => Ok(()),
            other => bail!("a worker answered {other:?}"),
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            worker.orders = None;
            let _ = worker.child.kill();
            let _ = worker.child.wait();
        }
    }
}

/// `bench spin`: a process that uses one CPU until its standard input ends. Not for people.
#[derive(Args, Clone, Copy, Debug)]
pub struct SpinCommand {}

impl SpinCommand {
    /// Runs until the standard input ends.
    ///
    /// # Errors
    /// None.
    pub fn run(self) -> Result<ExitCode> {
        use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Relaxed) {
                    std::hint::spin_loop();
                }
            });
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            over.store(true, Relaxed);
        });
        Ok(ExitCode::SUCCESS)
    }
}
