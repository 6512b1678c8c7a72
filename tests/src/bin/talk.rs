//! A program for the tests of connections.
//!
//! `talk echo NUMBER`: listens on all addresses, writes the port to the file `port`, accepts that many
//! connections, and sends back whatever comes, each until its end.
//!
//! `talk crowd NUMBER`: the same for one connection, with so many children beside, each of two threads, which write
//! into the file `count-N` how often they have written there, and live as long as their parent.
//!
//! `talk pour BYTES`: accepts one connection and writes that many bytes of a sequence into it.
//!
//! `talk trickle BYTES`: the same, in segments of 100 bytes, when 100 bytes have come; ends after its peer.
//!
//! `talk part BYTES`: writes so many when 100 bytes have come, closes its direction, and expects `parted` in the other.
//!
//! `talk hold`: listens and accepts nothing until there is a file `go`.
//!
//! `talk ask PATH`: asks a unix socket again and again until that ends, and counts the answers in the file
//! `answers`.
//!
//! `talk log PATH`: sends datagrams to a unix socket for ever.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use firn_tests::sequence;

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["ask", path] => ask(UnixStream::connect(path)?),
        ["log", path] => log(path),
        ["count", path] => count(path),
        ref listening => listen(listening),
    }
}

fn listen(arguments: &[&str]) -> Outcome {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    let port = listener.local_addr()?.port();
    std::fs::write("port.new", port.to_string())?;
    std::fs::rename("port.new", "port")?;
    match *arguments {
        ["echo", number] => echo(&listener, number.parse()?),
        ["crowd", number] => crowd(&listener, number.parse()?),
        ["pour", bytes] => pour(listener.accept()?.0, bytes.parse()?),
        ["trickle", bytes] => trickle(listener.accept()?.0, bytes.parse()?),
        ["part", bytes] => part(listener.accept()?.0, bytes.parse()?),
        ["hold"] => hold(&listener),
        _ => Err(
            "usage: talk echo NUMBER | crowd NUMBER | pour BYTES | trickle BYTES | part BYTES | hold | ask PATH | log PATH"
                .into(),
        ),
    }
}

fn echo(listener: &TcpListener, number: usize) -> Outcome {
    let mut threads = Vec::new();
    for _ in 0..number {
        let mut stream = listener.accept()?.0;
        threads.push(thread::spawn(move || -> std::io::Result<()> {
            let mut room = vec![0; 1 << 16];
            loop {
                match stream.read(&mut room)? {
                    0 => return Ok(()),
                    len => stream.write_all(&room[..len])?,
                }
            }
        }));
    }
    for thread in threads {
        thread.join().map_err(|_| "a connection panicked")??;
    }
    Ok(())
}

fn crowd(listener: &TcpListener, number: usize) -> Outcome {
    let mut children = Vec::new();
    for nr in 0..number {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["count", &format!("count-{nr}")]);
        children.push(command.stdin(Stdio::piped()).spawn()?);
    }
    echo(listener, 1)?;
    for mut child in children {
        drop(child.stdin.take());
        if !child.wait()?.success() {
            return Err("a child has failed".into());
        }
    }
    Ok(())
}

fn count(path: &str) -> Outcome {
    let file = File::create(path)?;
    let parent = thread::spawn(|| std::io::stdin().read(&mut [0; 1]));
    for nr in 1u64.. {
        file.write_all_at(nr.to_string().as_bytes(), 0)?;
        thread::sleep(Duration::from_micros(100));
        if parent.is_finished() {
            break;
        }
    }
    Ok(())
}

fn pour(mut stream: TcpStream, bytes: u64) -> Outcome {
    for start in (0..bytes).step_by(1 << 12) {
        stream.write_all(&sequence(start, 1 << 12))?;
    }
    Ok(())
}

fn trickle(mut stream: TcpStream, bytes: u64) -> Outcome {
    const STEP: usize = 100;
    stream.set_nodelay(true)?;
    stream.read_exact(&mut [0; STEP])?;
    for start in (0..bytes).step_by(STEP) {
        stream.write_all(&sequence(start, STEP))?;
    }
    // Until the peer has had enough.
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

fn part(mut stream: TcpStream, bytes: usize) -> Outcome {
    stream.read_exact(&mut [0; 100])?;
    stream.write_all(&sequence(0, bytes))?;
    stream.shutdown(Shutdown::Write)?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    match said.as_str() {
        "parted" => Ok(()),
        _ => Err(format!("the peer has said {said:?}").into()),
    }
}

fn hold(listener: &TcpListener) -> Outcome {
    while !Path::new("go").exists() {
        thread::sleep(Duration::from_millis(5));
    }
    let mut stream = listener.accept()?.0;
    stream.write_all(b"welcome")?;
    Ok(())
}

fn ask(mut stream: UnixStream) -> Outcome {
    for nr in 1u32.. {
        // Whoever is gone does not listen either.
        let _ = stream.write_all(b"ping\n");
        let mut answer = [0; 5];
        if stream.read_exact(&mut answer).is_err() {
            break;
        }
        std::fs::write("answers.new", nr.to_string())?;
        std::fs::rename("answers.new", "answers")?;
    }
    Ok(())
}

fn log(path: &str) -> Outcome {
    let socket = UnixDatagram::unbound()?;
    socket.connect(path)?;
    loop {
        socket.send(b"a line of a log")?;
        thread::sleep(Duration::from_millis(20));
    }
}
